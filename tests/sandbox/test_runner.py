import os
import signal
import time

import pytest

from restem_lightning.errors import UserError
from restem_lightning.sandbox import Runner, SandboxReport, probe, require
from restem_lightning.sandbox.levels import attack

TESTS = "assert f(3) == 6\nassert f(4) == 8"
MEMORY = 1 << 28


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def runner(request):
    runner = Runner(request.param, memory_bytes=MEMORY)
    yield runner
    runner.close()


def outcome(runner, program, tests=TESTS, *, names=("f",), preamble=None, cpu_s=2.0):
    return runner.judge(program, tests, names=list(names), preamble=preamble, cpu_s=cpu_s)


@pytest.mark.parametrize(
    "program",
    [
        "def f(x): return 2 * x",
        "print('hello', flush=True)\ndef f(x):\n    print(x)\n    return 2 * x",
        "def f(x): return 0 if x == 0 else 2 + f(x - 1)",
        "import sys\nsys.setrecursionlimit(20000)\n"
        "def g(n): return 0 if n == 0 else 1 + g(n - 1)\ndef f(x): return g(2 * x + 15000) - 15000",
        "import math, re, heapq, itertools, functools, collections, string, json, random\n"
        "from typing import List, Optional\n"
        "def f(x: int) -> Optional[int]: return math.prod([2, x]) if re.match('a', 'a') else None",
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n"
        "def f(x): return 2 * P(x).x",
        "import threading\ndef f(x):\n    r = []\n"
        "    t = threading.Thread(target=lambda: r.append(2 * x))\n"
        "    t.start()\n    t.join()\n    return r[0]",
        "class Solution:\n    def f(self, x): return 2 * x",
        "if __name__ == '__main__': input()\nf = lambda x: 2 * x",
        "from fractions import Fraction\ndef f(x): return Fraction(4 * x, 2)",
    ],
)
def test_honest_programs_pass(runner, program):
    result = outcome(runner, program)
    assert (result.kind, result.detail) == ("passed", "")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("{1, 2}", "{2, 1}"),
        ("(1, [2.5, None], {'a': b'x'})", "(1, [2.5, None], {'a': b'x'})"),
        ("{1: {(2, 3): 4}}", "{1: {(2, 3): 4}}"),
        ("1j", "1j"),
        ("__import__('collections').Counter('aab')", "{'a': 2, 'b': 1}"),
        ("__import__('collections').defaultdict(int, a=1)", "{'a': 1}"),
        ("__import__('collections').namedtuple('P', 'x y')(1, 2)", "(1, 2)"),
        ("frozenset([1])", "{1}"),
        ("range(3)", "range(0, 3)"),
        ("10 ** 6000", "10 ** 6000"),
        ("'\\ud800\\x00\\u202e'", "'\\ud800\\x00\\u202e'"),
        ("float('inf')", "float('inf')"),
    ],
)
def test_plain_values_cross_unchanged_both_ways(runner, value, expected):
    program = f"def f(x): return (x == {value}) and {value}"
    assert outcome(runner, program, f"assert f({value}) == {expected}").kind == "passed"


def test_what_has_no_encoding_crosses_for_its_truth_only(runner):
    program = "import re\ndef f(x): return re.match('a', x)"
    assert outcome(runner, program, "assert f('a')\nassert not f('b')").kind == "passed"
    assert outcome(runner, program, "assert f('a') == f('a')").kind == "failed"
    assert outcome(runner, program, "assert f('a') != 1").kind == "failed"


@pytest.mark.parametrize(
    ("result", "test"),
    [
        ("(2 * i for i in range(x))", "assert list(f(3)) == [0, 2, 4]"),
        ("map(str, range(x))", "assert ''.join(f(3)) == '012'"),
        ("{1: x}.keys()", "assert set(f(3)) == {1} and len(f(3)) == 1"),
        ("{1: x}.items()", "(a, b), = f(3)\nassert (a, b) == (1, 3)"),
        ("iter([x])", "it = f(3)\nassert next(it) == 3 and next(it, None) is None"),
        ("__import__('array').array('i', [x, 5])", "assert f(3)[1] == 5 and 3 in f(3)"),
    ],
)
def test_items_and_length_of_what_has_no_encoding_are_asked_for(runner, result, test):
    assert outcome(runner, f"def f(x): return {result}", test).kind == "passed"
    wrong = f"def f(x): return {result.replace('x', '(x + 4)')}"
    assert outcome(runner, wrong, test + "\nassert list(f(3)) == []").kind == "failed"


def test_items_are_no_more_to_be_believed_than_what_holds_them(runner):
    always = "class A:\n    def __eq__(self, _): return True\n"
    for result in ("(A() for _ in 'ab')", "iter([A(), A()])"):
        program = f"{always}def f(x): return {result}"
        assert outcome(runner, program, "assert list(f(1)) == [1, 2]").kind == "failed"
    endless = "import itertools\ndef f(x): return itertools.count()"
    assert outcome(runner, endless, "assert list(f(1)) == [1]", cpu_s=1).kind != "passed"
    assert outcome(runner, "def f(x): return 2 * x").kind == "passed"


def test_objects_of_the_program_can_be_made_changed_and_passed_back(runner):
    program = (
        "class Node:\n    def __init__(self, x): self.x, self.next = x, None\n"
        "def f(node): return node.x + (f(node.next) if node.next else 0)"
    )
    tests = "n = Node(1)\nn.next = Node(2)\nassert f(n) == 3\nassert n.next.x == 2"
    assert outcome(runner, program, tests).kind == "passed"


def test_tests_get_their_own_modules_and_the_prompts_helpers(runner):
    program = (
        "class math:\n    isclose = lambda *a: True\ndef helper(x): return 0\ndef f(x): return 5"
    )
    preamble = "def helper(x):\n    return 2 * x\ndef f(x):\n    '''Doubles.'''\n"
    assert outcome(runner, program, "assert math.isclose(f(1), 2)").kind == "failed"
    assert outcome(runner, program, "assert helper(f(1)) == 0", preamble=preamble).kind == "failed"
    assert outcome(runner, program, "assert helper(f(1)) == 10", preamble=preamble).kind == "passed"


@pytest.mark.parametrize(
    ("tests", "detail"),
    [
        ("f(1)", "the tests: ValueError: no assert"),
        ("", "the tests: ValueError: no assert"),
        (
            "import no_such\nassert f(1) == 1",
            "the tests: ModuleNotFoundError: No module named 'no_s",
        ),
        ("assert f(lambda: 1) == 1", "the tests pass <class 'function'>, which has no encoding"),
    ],
)
def test_tests_that_cannot_judge_blame_no_program(runner, tests, detail):
    result = outcome(runner, "def f(x): return x", tests)
    assert (result.kind, result.detail[: len(detail)]) == ("broken", detail)
    assert outcome(runner, "def f(x): return 2 * x").kind == "passed"


@pytest.mark.parametrize(
    "tests",
    [
        "def check(g):\n    assert g(3) == 6\n    assert g(4) == 8",
        "def test_it():\n    assert f(3) == 6\n    assert f(4) == 8",
        "def test():\n    assert f(3) == 6\nif __name__ == '__main__':\n    test()",
    ],
)
def test_checks_that_nothing_calls_are_called(runner, tests):
    assert outcome(runner, "def f(x): return 2 * x", tests).kind == "passed"
    wrong = outcome(runner, "def f(x): return 7", tests)
    assert wrong.kind == "failed"
    assert "assert" in wrong.detail.lower()


def test_unittest_classes_are_run():
    tests = (
        "import unittest\nclass T(unittest.TestCase):\n    def test_f(self):\n"
        "        self.assertEqual(f(3), 6)\nif __name__ == '__main__':\n    unittest.main()"
    )
    patched = "import unittest\nunittest.TestCase.assertEqual = print\ndef f(x): return 7"
    runner = Runner("namespaces", memory_bytes=MEMORY)
    try:
        assert outcome(runner, "def f(x): return 2 * x", tests).kind == "passed"
        wrong = outcome(runner, patched, tests)
        assert (wrong.kind, wrong.detail) == ("failed", "__main__.T.test_f: AssertionError: 7 != 6")
        assert outcome(runner, "import os\ndef f(x): os._exit(0)", tests).kind == "lost"
        skipped = tests.replace("    def", "    @unittest.skipIf(f(3), '')\n    def")
        assert outcome(runner, "def f(x): return 7", skipped).detail == "not all asserts ran"
    finally:
        runner.close()


def test_tests_whose_asserts_do_not_run_pass_nothing(runner):
    loop = outcome(runner, "def f(x): return []", "for x in f(1): assert x == 1")
    assert loop.detail == "not all asserts ran"
    early = "def check(g):\n    if g(1): return\n    assert g(1) == 2\ncheck(f)"
    assert outcome(runner, "def f(x): return 1", early).kind == "failed"


def test_each_program_starts_afresh(runner):
    mark = "import math, os\nmath.mark = 1\nopen('left', 'w').close() if FILES else 0\n"
    mark = mark.replace("FILES", str(runner.level == "namespaces"))
    look = "import math, os\ndef f(x): return [hasattr(math, 'mark'), os.path.exists('left')]"
    assert outcome(runner, mark + "def f(x): return 2 * x").kind == "passed"
    assert outcome(runner, look, "assert f(0) == [False, False]").kind == "passed"


def test_files_are_private_and_in_memory():
    runner = Runner("namespaces", memory_bytes=MEMORY)
    program = "def f(x):\n    open('a', 'w').write('6')\n    return int(open('/tmp/a').read())"
    try:
        assert outcome(runner, program, "assert f(3) == 6").kind == "passed"
    finally:
        runner.close()
    assert not os.path.exists("/tmp/a")


def test_limits_end_in_timeout_or_failure_and_cost_little_more(runner):
    start = time.monotonic()
    assert outcome(runner, "while True: pass", cpu_s=1).kind == "timeout"
    assert outcome(runner, "import time\ntime.sleep(99)", cpu_s=0.3).kind == "timeout"
    memory = outcome(runner, "def f(x): return len(bytearray(1 << 30))")
    assert (memory.kind, memory.detail) == ("failed", "MemoryError")
    assert time.monotonic() - start < 15.0


def test_verdicts_do_not_follow_the_hash_seed(runner):
    program = "def f(x): return hash('a') % 11"
    again = Runner(runner.level, memory_bytes=MEMORY)
    try:
        tests = [f"assert f(0) == {value}" for value in range(11)]
        found = [[outcome(r, program, test).kind for test in tests] for r in (runner, again)]
    finally:
        again.close()
    assert found[0] == found[1]


def test_a_script_gets_input_and_gives_output_whatever_way_it_reads(runner):
    for read in ("input()", "open(0).read()", "sys.stdin.readline()", "os.read(0, 9).decode()"):
        result = runner.run_script(f"import os, sys\nprint(int({read}) * 2)", b"21\n", cpu_s=2)
        assert (result.kind, result.output) == ("passed", b"42\n")
    assert runner.run_script("print(1)\n1 / 0", b"", cpu_s=2).kind == "failed"
    for leave in ("exit()", "quit()", "sys.exit(0)", "raise SystemExit"):
        result = runner.run_script(f"import sys\nprint(1)\n{leave}\nprint(2)", b"", cpu_s=2)
        assert (result.kind, result.output) == ("passed", b"1\n")
    assert runner.run_script("import os\nos.abort()", b"", cpu_s=2).kind == "lost"
    flood = runner.run_script("while True: print('x' * 4096)", b"", cpu_s=2)
    assert flood.kind != "passed"
    assert len(flood.output) <= 1 << 24


@pytest.mark.parametrize(
    "program",
    [
        "import threading, time\n"
        "threading.Thread(target=lambda: time.sleep(0.2) or print(1)).start()",
        "import atexit\natexit.register(print, 1)",
        "import sys\nsys.stdout = None\nsys.__stdout__.write('1\\n')",
        "out = open(1, 'w')\nprint(1, file=out)",
        "import os, sys\nclass Out:\n    write = lambda self, text: None\n"
        "    flush = lambda self: os.write(1, b'1\\n')\nsys.stdout = Out()",
        "class A:\n    def __del__(self): print(1)\na = A()",
        "import threading, time\nprint(1)\n"
        "threading.Thread(target=time.sleep, args=(99,), daemon=True).start()",
    ],
)
def test_what_a_script_writes_behind_its_last_line_counts(runner, program):
    result = runner.run_script(program, b"", cpu_s=2)
    assert (result.kind, result.output) == ("passed", b"1\n")


def test_a_script_ends_with_idle_threads_in_its_executor():
    program = (
        "from concurrent.futures import ThreadPoolExecutor\nThreadPoolExecutor().submit(print)"
    )
    runner = Runner("namespaces", memory_bytes=MEMORY)
    try:
        assert runner.run_script(program, b"", cpu_s=2).output == b"\n"
    finally:
        runner.close()


def test_a_killed_sandbox_is_replaced(runner):
    assert outcome(runner, "def f(x): return 2 * x").kind == "passed"
    os.kill(runner._sandboxes["candidate"]._process.pid, signal.SIGKILL)
    time.sleep(0.2)
    for _ in range(2):
        try:
            result = outcome(runner, "def f(x): return 2 * x")
        except Exception as error:
            result = error
    assert result.kind == "passed"


def test_the_probe_attacks_every_level_and_finds_none_open():
    report = probe()
    assert report.level in ("namespaces", "landlock")
    assert report.has_own_user == (os.geteuid() == 0)
    for level in ("namespaces", "landlock", "seccomp"):
        runner = Runner(level, memory_bytes=MEMORY)
        try:
            assert attack(runner) == []
        finally:
            runner.close()


def test_foreign_code_is_refused_below_the_level_that_is_set():
    weak = SandboxReport(level="seccomp", refusals=("level namespaces: forbidden",))
    assert require("seccomp", weak).level == "seccomp"
    with pytest.raises(UserError, match=r"refused.*seccomp.*landlock.*forbidden.*Remedy"):
        require("landlock", weak)
    with pytest.raises(UserError, match="must be one of namespaces, landlock, seccomp"):
        require("docker")
