"""Verifiers and the processes that they run in."""

from restem_lightning.verifiers.base import (
    VERIFIERS,
    CallableVerifier,
    Verifier,
    VerifierSpec,
    verifier_spec,
)
from restem_lightning.verifiers.batch import check_references, verify_file
from restem_lightning.verifiers.composed import ComposedVerifier
from restem_lightning.verifiers.math import MathVerifier
from restem_lightning.verifiers.pool import VerifierPool
from restem_lightning.verifiers.procedural import ProceduralVerifier

__all__ = [
    "VERIFIERS",
    "CallableVerifier",
    "ComposedVerifier",
    "MathVerifier",
    "ProceduralVerifier",
    "Verifier",
    "VerifierPool",
    "VerifierSpec",
    "check_references",
    "verifier_spec",
    "verify_file",
]
