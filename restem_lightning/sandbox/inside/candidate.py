"""The candidate: loads a program and answers calls, or runs it as a script."""

import atexit
import builtins
import contextlib
import operator
import socket
import sys
import threading
import types
from typing import Any

from .codec import Channel, ChannelError

_MAX_TEXT = 300
_OPERATIONS = {"iter": iter, "next": next, "len": len, "item": operator.getitem}


class _Objects:
    """The objects that the judge knows by number; they never leave this process."""

    def __init__(self) -> None:
        self._known: list[Any] = []

    def number(self, value: Any) -> list[Any]:
        self._known.append(value)
        return [len(self._known) - 1, bool(value)]

    def find(self, number: int, _: bool) -> Any:
        return self._known[number]


def serve_calls(stream: socket.socket) -> None:
    """Loads the program of the first message, then answers the judge until it leaves."""
    objects = _Objects()
    channel = Channel(stream, objects.number, objects.find)
    problem: BaseException | None = None
    module = types.ModuleType("program")
    try:
        _execute(channel.receive()[0], module)
    except ChannelError:
        raise
    except BaseException as error:  # whatever a program raises is its own fault
        problem = error
    while True:
        request = channel.receive()
        try:
            if problem is not None:
                raise problem
            channel.send(["value", _answer(module, *request)])
        except ChannelError as error:
            channel.send(["raise", "ValueError", str(error)])
        except BaseException as error:
            channel.send(["raise", *describe(error)])


def run_script(stream: socket.socket) -> None:
    """Runs the program of the first message as `__main__`, and says how it went, in words only."""
    channel = Channel(stream)
    text, module = channel.receive()[0], types.ModuleType("__main__")
    try:
        _execute(text, module)
        outcome = ["ended", "", ""]
    except SystemExit as error:
        outcome = ["ended", "", ""] if error.code in (None, 0) else ["raised", *describe(error)]
    except BaseException as error:
        outcome = ["raised", *describe(error)]
    _leave(module)
    channel.send(outcome)


def describe(error: BaseException) -> tuple[str, str]:
    """Returns an exception as two plain strings, its type's name and its message."""
    name = type(error).__name__ if isinstance(type(error).__name__, str) else "Exception"
    try:
        message = str.__str__(str(error))[:_MAX_TEXT]
    except BaseException:
        message = ""
    return str.__str__(name)[:_MAX_TEXT], message


def _leave(module: types.ModuleType) -> None:
    """Does what an interpreter does behind a program's last line: much output is written here."""
    threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing ends its children
    atexit._run_exitfuncs()
    with contextlib.suppress(Exception):  # it may be anything that the program has put there
        sys.stdout.flush()
    module.__dict__.clear()  # closes its files
    with contextlib.suppress(OSError, ValueError):
        sys.__stdout__.flush()


def _execute(text: str, module: types.ModuleType) -> None:
    sys.modules[module.__name__] = module
    module.__file__ = "program.py"
    builtins.exit = builtins.quit = sys.exit  # `site`, which would add them, is left out
    code = compile(text, "program.py", "exec", dont_inherit=True)
    exec(code, module.__dict__)


def _answer(module: types.ModuleType, verb: str, target: Any, *rest: Any) -> Any:
    if verb == "get":
        return _find(module, target)
    if verb == "call":
        arguments, named = rest
        return target(*arguments, **named)
    if verb in _OPERATIONS:
        return _OPERATIONS[verb](target, *rest)
    if verb == "attribute":
        return getattr(target, rest[0])
    setattr(target, *rest)
    return None


def _find(module: types.ModuleType, name: str) -> Any:
    """Returns what the program calls `name`; a method of its class Solution counts too."""
    if name in module.__dict__:
        return module.__dict__[name]
    solution = module.__dict__.get("Solution")
    if solution is not None and hasattr(solution, name):
        return getattr(solution(), name)
    if hasattr(builtins, name):
        return getattr(builtins, name)
    raise NameError(f"the program has no {name!r}")
