"""Verifiers: the protocol, and a pool of bounded worker processes that can be killed."""

import importlib
import importlib.util
import json
import os
import struct
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from restem_lightning.completions import Verdict, VerdictKind
from restem_lightning.errors import UserError
from restem_lightning.problems import Problem

HEADER = struct.Struct(">I")
VERIFIERS = {
    "code": "restem_lightning.verifiers.CodeVerifier",
    "math": "restem_lightning.verifiers.MathVerifier",
    "procedural": "restem_lightning.verifiers.ProceduralVerifier",
    "callable": "restem_lightning.verifiers.CallableVerifier",
    "composed": "restem_lightning.verifiers.ComposedVerifier",
}


class Verifier(Protocol):
    """Says whether a completion solves a problem; named by class path in YAML.

    Four members are optional. `cache_key(problem, completion_text)` returns a tuple such that
    equal keys mean equal verdicts (or None: do not cache). `quick_verdict(cache_key)` returns that
    verdict if microseconds are enough for it, else None: then a worker is asked. Both run in the
    sampling process, so they must be cheap and safe for any text. `warm_up()` does slow imports; a
    worker calls it before its first job. `deadline_s` is how long a job may take if the verifier
    bounds its jobs itself.

    Attributes:
        name: recorded with each verdict.
        version: recorded with each verdict; changes when verdicts may change.
    """

    name: str
    version: str

    def verify(self, problem: Problem, completion_text: str) -> Verdict:
        """Returns the verdict, a pure function of its arguments; an exception means ERROR."""

    def reference_completion(self, problem: Problem) -> str | None:
        """Returns a completion that must be CORRECT (the self check), None if there is none."""


class CallableVerifier:
    """A verifier made of one function of the user's."""

    def __init__(self, function: str, name: str = "callable", version: str = "1") -> None:
        """Verifies by a function `f(problem, completion_text)` that returns a bool or a Verdict.

        Args:
            function: dotted path (package.module.name) or file and name (path/file.py:name).
            name: recorded with each verdict.
            version: recorded with each verdict; change it when the function changes.
        """
        self.name, self.version = name, version
        self._function: Callable[[Problem, str], Any] = load_object(function)

    def verify(self, problem: Problem, completion_text: str) -> Verdict:
        """Returns the function's Verdict, or CORRECT for True and WRONG for False."""
        result = self._function(problem, completion_text)
        if isinstance(result, Verdict):
            return result
        if not isinstance(result, bool):
            raise TypeError(f"the function must return a bool or a Verdict, not {type(result)}")
        return Verdict(kind=VerdictKind.CORRECT if result else VerdictKind.WRONG)

    def reference_completion(self, problem: Problem) -> str | None:
        """Returns the problem's reference solution; without one there is nothing to check."""
        return problem.reference_solution


@dataclass(frozen=True, kw_only=True)
class VerifierSpec:
    """How a worker process builds its verifier.

    Args:
        class_path: dotted path (package.module.Class) or file and name (path/file.py:Class).
        init_args: keyword arguments of the class, JSON-serialisable.
    """

    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Verifier:
        """Returns the verifier.

        Raises:
            UserError: the class is not to be found, refuses the arguments or is no verifier.
        """
        kind = load_object(self.class_path)
        try:
            verifier = kind(**self.init_args)
        except TypeError as error:
            raise UserError(
                f"{self.class_path} refuses init_args {self.init_args}: {error}"
            ) from error
        except UserError:
            raise
        except Exception as error:  # whatever the user's own class raises
            raise _unloadable(self.class_path, error) from error
        needed = ("name", "version", "verify", "reference_completion")
        if missing := [name for name in needed if not hasattr(verifier, name)]:
            raise UserError(
                f"{self.class_path} is no verifier: it lacks {', '.join(missing)} "
                "(see restem_lightning.verifiers.base.Verifier)"
            )
        return verifier


def verifier_spec(value: str | dict[str, Any]) -> VerifierSpec:
    """Returns how to build the verifier that a name, a class path or a mapping stands for.

    Raises:
        UserError: an unknown name or a mapping without class_path.
    """
    if isinstance(value, str):
        if value not in VERIFIERS and "." not in value:
            raise UserError(
                f"verifier ({value}) must be one of {', '.join(VERIFIERS)}, or a class path"
            )
        return VerifierSpec(class_path=VERIFIERS.get(value, value))
    unknown = set(value) - {"class_path", "init_args"}
    if unknown or "class_path" not in value:
        raise UserError(f"verifier ({value}) must hold class_path and, if wanted, init_args")
    class_path = VERIFIERS.get(value["class_path"], value["class_path"])
    return VerifierSpec(class_path=class_path, init_args=value.get("init_args") or {})


def frame(message: Any) -> bytes:
    """Returns the bytes of one message between pool and worker: its length, then its JSON."""
    payload = json.dumps(message).encode()
    return HEADER.pack(len(payload)) + payload


def load_object(path: str) -> Any:
    """Returns the object at package.module.name or path/file.py:name; the working folder counts.

    Raises:
        UserError: there is no such module, file or name.
    """
    file_name, colon, name = path.rpartition(":")
    if colon:
        module = _load_file(Path(file_name), path)
    else:
        module_name, _, name = path.rpartition(".")
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            module = importlib.import_module(module_name)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"cannot import {path!r} ({error}); give package.module.name or path/file.py:name"
            ) from error
        except Exception as error:  # whatever the user's own module raises
            raise _unloadable(path, error) from error
    if not hasattr(module, name):
        raise UserError(f"{path!r}: the module has no {name!r}")
    return getattr(module, name)


def _load_file(file: Path, path: str) -> Any:
    if not file.is_file() or file.suffix != ".py":
        raise UserError(f"{path!r}: {file} is not a Python file")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's own file raises
        raise _unloadable(path, error) from error
    return module


def _unloadable(path: str, error: Exception) -> UserError:
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if isinstance(error, SyntaxError) else f" in {place.filename} line {place.lineno}"
    return UserError(f"{path!r} cannot be loaded ({type(error).__name__}{where}: {error}); mend it")
