"""Verifiers and the processes that they run in."""

from restem_lightning.verifiers.base import CallableVerifier, Verifier, VerifierSpec
from restem_lightning.verifiers.batch import check_references, verify_file
from restem_lightning.verifiers.code import CodeVerifier
from restem_lightning.verifiers.math import MathVerifier
from restem_lightning.verifiers.pool import VerifierPool
from restem_lightning.verifiers.procedural import ProceduralVerifier

__all__ = [
    "CallableVerifier",
    "CodeVerifier",
    "MathVerifier",
    "ProceduralVerifier",
    "Verifier",
    "VerifierPool",
    "VerifierSpec",
    "check_references",
    "verify_file",
]
