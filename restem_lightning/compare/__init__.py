"""`restem compare`: arms over seeds, with shared samples, intervals and paired tests."""

from restem_lightning.compare.command import compare

__all__ = ["compare"]
