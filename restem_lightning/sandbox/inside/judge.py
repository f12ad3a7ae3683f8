"""The judge: runs the tests, and asks the candidate's process for every value under test."""

import ast
import builtins
import importlib
import math
import random
import resource
import socket
import sys
import time
from typing import Any

from .candidate import describe
from .codec import Channel, ChannelError

_RAN = "__restem_assert_ran__"


class CandidateError(Exception):
    """An exception of the program's own that has no builtin type."""


class Opaque:
    """An object in the candidate's process: it can be called, passed back and asked for its truth.

    Its items and length are asked for as well, and come as plain data. It compares with nothing:
    what it says about equality would be the candidate's word.
    """

    __slots__ = ("_candidate", "_number", "_truth")

    def __init__(self, candidate: "_Candidate", number: int, truth: bool) -> None:
        """Stands for the object that the candidate knows by `number`."""
        object.__setattr__(self, "_candidate", candidate)
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_truth", truth)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Returns what the candidate's object returns."""
        return self._candidate.ask("call", self, list(arguments), named)

    def __getattr__(self, name: str) -> Any:
        """Returns an attribute of the candidate's object."""
        if name.startswith("__"):
            raise AttributeError(name)
        return self._candidate.ask("attribute", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute of the candidate's object."""
        self._candidate.ask("assign", self, name, value)

    def __iter__(self) -> Any:
        """Returns an iterator of the candidate's object, which is such an object too."""
        return self._candidate.ask("iter", self)

    def __next__(self) -> Any:
        """Returns the next item."""
        return self._candidate.ask("next", self)

    def __len__(self) -> int:
        """Returns the length of the candidate's object."""
        return self._candidate.ask("len", self)

    def __getitem__(self, key: Any) -> Any:
        """Returns an item of the candidate's object."""
        return self._candidate.ask("item", self, key)

    def __bool__(self) -> bool:
        """Returns the truth that the object had when it crossed."""
        return self._truth

    def _refuse(self, _: object) -> bool:
        raise TypeError("a value that is no plain data cannot be compared")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __hash__ = None  # type: ignore[assignment]


class _Candidate:
    """The other process, asked one thing at a time."""

    def __init__(self, stream: socket.socket) -> None:
        self._channel = Channel(stream, self._number, lambda *place: Opaque(self, *place))
        self.lost: str | None = None
        self.refused: str | None = None

    def ask(self, verb: str, *rest: Any) -> Any:
        """Returns the candidate's answer, or raises what it raised, by its name.

        Raises:
            ChannelError: it is gone or speaks nonsense; it stays so.
        """
        try:
            if self.lost is not None:
                raise ChannelError(self.lost)
            self._channel.send([verb, *rest])
            kind, *content = self._channel.receive()
            if kind == "value":
                (value,) = content
                return value
            name, message = content
            if kind != "raise" or type(name) is not str or type(message) is not str:
                raise ChannelError("a message that cannot be read")
        except (ChannelError, ValueError, TypeError) as error:
            self.lost = str(error)
            raise ChannelError(self.lost) from None
        raise _exception(name, message)

    def _number(self, value: Any) -> list[Any]:
        if type(value) is not Opaque:
            self.refused = f"the tests pass {type(value)}, which has no encoding"
            raise TypeError(self.refused)
        return [value._number, value._truth]


class _Names(dict):
    """The tests' global names; those that nobody has defined are the candidate's."""

    def __init__(self, candidate: _Candidate) -> None:
        super().__init__()
        self._candidate = candidate

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name) or name.startswith("__"):
            raise KeyError(name)
        if name in sys.stdlib_module_names:  # the candidate's `math` is not to be believed
            self[name] = importlib.import_module(name)
        else:
            self[name] = self._candidate.ask("get", name)
        return self[name]


def run_tests(report: socket.socket) -> None:
    """Runs the tests of one problem against one candidate after another, until the parent leaves.

    The first message on `report` is [tests, names under test, preamble]. Then each candidate comes
    as one byte with the descriptor of its socket, followed by [nonce, CPU seconds]; the answer is
    [nonce, outcome, detail, asserts that ran, asserts that must run]. Outcomes: passed, failed,
    lost, broken. Nothing of one run is left for the next but what the tests themselves changed.
    """
    parent = Channel(report)
    tests, names, preamble = parent.receive()
    try:
        code, num_expected = _compile_tests(tests, names)
        problem = ""
    except (SyntaxError, ValueError, ImportError, RecursionError, MemoryError) as error:
        problem = f"the tests: {': '.join(describe(error))}"
    while True:
        _, fds, _, _ = socket.recv_fds(report, 1, 1)
        if not fds:
            return
        nonce, cpu_s = parent.receive()
        with socket.socket(fileno=fds[0]) as stream:
            if problem:
                answer = ["broken", problem, 0, 0]
            else:
                limit = math.ceil(time.process_time() + cpu_s)
                _, allowed = resource.getrlimit(resource.RLIMIT_CPU)
                resource.setrlimit(resource.RLIMIT_CPU, (limit, allowed))
                run = _Run(_Candidate(stream), tests)
                answer = [*run.outcome(code, names, preamble), run.num_ran, num_expected]
        parent.send([nonce, *answer])


class _Run:
    """The tests against one candidate."""

    def __init__(self, candidate: _Candidate, tests: str) -> None:
        self._candidate, self._tests = candidate, tests
        self.num_ran = 0

    def outcome(self, code: Any, names: list[str], preamble: str | None) -> tuple[str, str]:
        """Returns the outcome and what decided it."""
        space = _Names(self._candidate)
        outcome, detail = "passed", ""
        try:
            random.seed(0)
            space.update(_run_preamble(preamble))
            space.update({_RAN: self._note, "__name__": "__main__"})
            for name in names:
                space[name] = self._candidate.ask("get", name)
            exec(code, space)
            if detail := self._run_cases(space):
                outcome = "failed"
        except ChannelError as error:
            outcome, detail = "lost", str(error)
        except AssertionError as error:
            outcome, detail = "failed", _failed_line(error, self._tests)
        except BaseException as error:  # a test that cannot go on has not passed
            outcome, detail = "failed", ": ".join(describe(error)).removesuffix(": ")
        if self._candidate.lost is not None:
            outcome, detail = "lost", self._candidate.lost
        if self._candidate.refused is not None:
            outcome, detail = "broken", self._candidate.refused
        return outcome, detail

    def _note(self) -> None:
        self.num_ran += 1

    def _run_cases(self, space: dict[str, Any]) -> str:
        """Runs the tests' unittest classes, a method as an assert; returns what failed, if any."""
        if (unittest := sys.modules.get("unittest")) is None:
            return ""
        for kind in [value for value in space.values() if isinstance(value, type)]:
            if issubclass(kind, unittest.TestCase):
                suite = unittest.defaultTestLoader.loadTestsFromTestCase(kind)
                result = suite.run(unittest.TestResult())
                for method, trace in result.errors + result.failures:
                    return f"{method.id()}: {trace.splitlines()[-1]}"[:300]
                self.num_ran += result.testsRun - len(result.skipped)
        return ""


def _compile_tests(tests: str, names: list[str]) -> tuple[Any, int]:
    """Returns the code of the tests with each assert counted, and how many must run at least.

    Functions `check` and `test...` that nothing calls are called, with the first name if they take
    an argument. Methods `test...` count as asserts.

    Raises:
        SyntaxError, ...: they are no Python.
        ValueError: they hold no assert.
        ImportError: they import what is not here.
    """
    tree = ast.parse(tests)
    classes = [item for item in tree.body if isinstance(item, ast.ClassDef)]
    num_methods = len([item for kind in classes for item in _functions(kind.body, "test")])
    if not num_methods and not any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
        raise ValueError("no assert")
    for line in tree.body:
        if isinstance(line, ast.Import | ast.ImportFrom):
            exec(compile(ast.Module([line], []), "tests", "exec", dont_inherit=True), {})
    if unittest := sys.modules.get("unittest"):
        unittest.main = lambda *_, **__: None  # type: ignore[attr-defined]  # _run_cases does it
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    checks = _functions(tree.body, "check")
    uncalled = [item for item in checks + _functions(tree.body, "test") if item.name not in used]
    calls = [f"{item.name}({names[0] if names and item.args.args else ''})" for item in uncalled]
    must_run = checks + [item for item in uncalled if item not in checks]
    inner = [line for item in must_run for line in item.body]
    tree.body = [*_cheap_first(tree.body), *ast.parse("\n".join(calls)).body]
    num_expected = sum(isinstance(line, ast.Assert) for line in [*tree.body, *inner])
    tree = ast.fix_missing_locations(_CountAsserts().visit(tree))
    code = compile(tree, "tests", "exec", dont_inherit=True, optimize=0)
    return code, max(1, num_expected + num_methods)


def _functions(body: list[ast.stmt], prefix: str) -> list[ast.FunctionDef]:
    functions = [line for line in body if isinstance(line, ast.FunctionDef)]
    return [line for line in functions if line.name.startswith(prefix)]


def _cheap_first(body: list[ast.stmt]) -> list[ast.stmt]:
    """Returns the statements with each run of asserts in the order of their length."""
    result: list[ast.stmt] = []
    run: list[ast.stmt] = []
    for line in [*body, None]:
        if isinstance(line, ast.Assert):
            run.append(line)
            continue
        result += sorted(run, key=lambda item: len(ast.dump(item)))
        run = []
        if line is not None:
            result.append(line)
    return result


class _CountAsserts(ast.NodeTransformer):
    """Puts a call behind each assert."""

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
        """Returns the assert and the call."""
        call = ast.Call(ast.Name(_RAN, ast.Load()), [], [])
        return [node, ast.copy_location(ast.Expr(call), node)]


def _run_preamble(preamble: str | None) -> dict[str, Any]:
    """Returns the names that a prompt defines (imports, helper functions)."""
    space: dict[str, Any] = {"__name__": "tests"}
    try:
        exec(compile(preamble or "", "prompt", "exec", dont_inherit=True), space)
    except Exception:  # a prompt need not be a program; names it lacks are asked of the candidate
        return {}
    return space


def _exception(name: str, message: str) -> Exception:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(message)
        except TypeError:
            pass
    return CandidateError(f"{name}: {message}")


def _failed_line(error: AssertionError, tests: str) -> str:
    """Returns the source of the assert that failed."""
    place, number = error.__traceback__, 0
    while place is not None:
        if place.tb_frame.f_code.co_filename == "tests":
            number = place.tb_lineno
        place = place.tb_next
    lines = tests.splitlines()
    return lines[number - 1].strip()[:300] if 0 < number <= len(lines) else "an assert"
