"""`restem fit`: its command line, its checks, and the iterations one after the other."""

from restem_lightning.fit.assembly import load_problems, make_loop
from restem_lightning.fit.checks import check_settings, iterations_that_differ
from restem_lightning.fit.command_line import ReSTEMCLI, make_cli
from restem_lightning.fit.run import fit

__all__ = [
    "ReSTEMCLI",
    "check_settings",
    "fit",
    "iterations_that_differ",
    "load_problems",
    "make_cli",
    "make_loop",
]
