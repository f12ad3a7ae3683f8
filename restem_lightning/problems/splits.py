"""Splits of generated problems, and what their sources have in common."""

import hashlib

from restem_lightning.errors import UserError

SPLIT_SHARES = {"corpus": 60, "train": 25, "validation": 5, "held_out": 10}


def split_of(text: str) -> str:
    """Returns the one split that a text belongs to: corpus, train, validation or held_out."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 100
    for split, share in SPLIT_SHARES.items():
        if bucket < share:
            return split
        bucket -= share
    raise AssertionError("the shares add up to 100")


class GeneratedProblems:
    """A source of problems that are generated on the spot; `source` is its name in their ids."""

    source: str

    def __init__(self, split: str, num: int, seed: int = 0):
        """Describes a fixed list of problems.

        Args:
            split: train, validation or held_out (corpus is what the embedded policy read).
            num: number of problems, at least 1.
            seed: another seed gives other problems of the same split.

        Raises:
            UserError: for an unknown split or a num below 1.
        """
        if split not in SPLIT_SHARES:
            raise UserError(f"split ({split}) must be one of {', '.join(SPLIT_SHARES)}")
        if num < 1:
            kind = self.source.replace("_", " ")
            raise UserError(f"num ({num}) of {kind} must be at least 1")
        self.split, self.num, self.seed = split, num, seed
