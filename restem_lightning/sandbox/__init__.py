"""Foreign code behind walls: isolation levels, a warm fork server, judge and candidate apart."""

from restem_lightning.sandbox.client import LEVELS, SandboxError
from restem_lightning.sandbox.levels import SandboxReport, probe, require
from restem_lightning.sandbox.runner import Outcome, Runner

__all__ = ["LEVELS", "Outcome", "Runner", "SandboxError", "SandboxReport", "probe", "require"]
