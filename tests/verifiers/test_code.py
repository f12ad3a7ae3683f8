import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import tokenize
from pathlib import Path

import pytest

from restem_lightning.errors import UserError
from restem_lightning.problems import MBPP, HumanEval, Problem
from restem_lightning.verifiers import CodeVerifier, VerifierPool, VerifierSpec, verify_file
from restem_lightning.verifiers.code import same_output

DATA = Path(__file__).parents[3] / "shared" / "data"
SPEC = VerifierSpec(class_path="restem_lightning.verifiers.CodeVerifier")
ADD = Problem(problem_id="add", question="q", tests="assert add(1, 2) == 3", entry_point="add")


@pytest.fixture(scope="module")
def verifier():
    verifier = CodeVerifier(time_limit_s=1.0)
    yield verifier
    verifier.close()


@pytest.fixture(scope="module")
def reference_problems():
    if not DATA.is_dir():
        pytest.skip("the data sets are not beside this checkout")
    files = [DATA / "mbpp" / name for name in ("mbpp.jsonl.gz", "sanitized-mbpp.jsonl.gz")]
    splits = ("prompt", "test", "validation", "train")
    mbpp = [p for file in files for split in splits for p in MBPP(str(file), split).load()]
    return [*mbpp, *HumanEval(str(DATA / "humaneval")).load()]


def verdict(verifier, program, problem=ADD):
    return verifier.verify(problem, f"```python\n{program}\n```").kind.value


def scripts(inputs, outputs, **more):
    cases = {"inputs": inputs, "outputs": outputs, **more}
    return Problem(
        problem_id="io",
        question="q",
        entry_point=more.get("fn_name"),
        metadata={"input_output": cases},
    )


def test_every_reference_program_is_accepted(verifier, reference_problems):
    assert len(reference_problems) == 974 + 427 + 164
    step = int(os.environ.get("RESTEM_REFERENCE_STEP", "4"))  # 1: all of them
    refused = []
    for problem in reference_problems[::step]:
        found = verifier.verify(problem, verifier.reference_completion(problem))
        if found.kind.value != "CORRECT":
            refused.append((problem.problem_id, found.kind.value, found.detail))
    assert refused == []


def test_a_slow_reference_gets_the_time_that_it_needs(verifier, reference_problems):
    (problem,) = [p for p in reference_problems if p.problem_id == "mbpp/123"][:1]
    completion = verifier.reference_completion(problem)
    assert verifier.verify(problem, completion).kind.value == "CORRECT"


def mutants(source, seed):
    """Yields programs with one operator or number of the source changed."""
    swaps = {"+": "-", "-": "+", "<": ">=", ">": "<=", "==": "!=", "*": "+", "and": "or"}
    lines = source.splitlines(keepends=True)
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    random.Random(seed).shuffle(tokens)
    for token in tokens:
        new = swaps.get(token.string)
        if token.type == tokenize.NUMBER and token.string.isdigit():
            new = str(int(token.string) + 1)
        if new is not None and token.start[0] == token.end[0]:
            row, column = token.start
            line = lines[row - 1]
            changed = line[:column] + new + line[column + len(token.string) :]
            yield "".join([*lines[: row - 1], changed, *lines[row:]])


def fails_natively(program, problem):
    """Returns whether a mutant of a reference program (no foreign code) fails its tests here."""
    source = f"{program}\n{problem.tests}"
    try:
        words = [sys.executable, "-S", "-c", source]
        return subprocess.run(words, capture_output=True, timeout=2.0).returncode != 0
    except subprocess.TimeoutExpired:
        return False


def test_one_token_faults_that_fail_natively_are_rejected(verifier, reference_problems):
    accepted, num_rejected = [], 0
    for index, problem in enumerate(reference_problems[5::40]):
        for mutant in list(mutants(problem.reference_solution, index))[:2]:
            if fails_natively(mutant, problem):
                num_rejected += 1
                if verdict(verifier, mutant, problem) == "CORRECT":
                    accepted.append((problem.problem_id, mutant))
    assert accepted == []
    assert num_rejected >= 30


def test_verdicts_tell_what_happened(verifier):
    assert verdict(verifier, "def add(a, b): return a + b") == "CORRECT"
    assert verdict(verifier, "def add(a, b): return a - b") == "WRONG"
    assert verdict(verifier, "def add(a, b: return") == "WRONG"
    assert verdict(verifier, "def add(a, b):\n    while True: pass") == "TIMEOUT"
    assert verifier.verify(ADD, "I do not know.").kind.value == "NO_ANSWER"
    broken = Problem(problem_id="b", question="q", tests="assert add(1 ==", entry_point="add")
    assert verdict(verifier, "def add(a, b): return a + b", broken) == "ERROR"
    with pytest.raises(UserError, match="neither tests nor"):
        verdict(verifier, "def add(a): pass", Problem(problem_id="n", question="q"))


def test_the_detail_names_the_assert_that_failed(verifier):
    found = verifier.verify(ADD, "```python\ndef add(a, b): return 4\n```")
    assert found.detail == "assert add(1, 2) == 3"


def test_equal_programs_have_equal_cache_keys_and_other_tests_other_ones(verifier):
    other = Problem(
        problem_id="add", question="q", tests="assert add(2, 2) == 4", entry_point="add"
    )
    texts = [
        "```python\ndef add(a, b): return 3\n```",
        "So:\n```python\ndef add(a, b): return 3\n```",
    ]
    keys = [verifier.cache_key(ADD, text) for text in texts]
    assert keys[0] == keys[1]
    assert verifier.cache_key(other, texts[0]) != keys[0]
    hash(keys[0])


@pytest.mark.parametrize(
    ("output", "expected", "is_same"),
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("1  2 \n\n3\n\n", "1 2\n3", True),
        ("1\n2\n3", "1 2\n3", False),
        ("3.0000001", "3.0", True),
        ("3.001", "3.0", False),
        ("3", "3.0", True),
        ("3.0", "3", False),
        ("nan", "1.0", False),
        ("YES", "Yes", False),
        ("", "1", False),
        ("1\n1", "1", False),
    ],
)
def test_output_is_compared_by_words_within_lines(output, expected, is_same):
    assert same_output(output, expected) == is_same


def test_standard_input_problems_need_every_output(verifier):
    problem = scripts(["1 2\n", ["10", "20"]], ["3\n", ["30"]])
    good = "import sys\nprint(sum(map(int, sys.stdin.read().split())))"
    assert verdict(verifier, good, problem) == "CORRECT"
    assert verdict(verifier, "print(3)", problem) == "WRONG"
    assert verdict(verifier, good + "\nraise SystemExit(1)", problem) == "WRONG"
    assert verdict(verifier, "while True: print(3)", problem) in ("WRONG", "TIMEOUT")


def test_function_cases_compare_values_with_tuples_as_lists(verifier):
    problem = scripts([[1, 2], [3, 4]], [[[1, 2]], [3, 4]], fn_name="pair")
    assert verdict(verifier, "def pair(a, b): return (a, b)", problem) == "CORRECT"
    method = "class Solution:\n    def pair(self, a, b): return [a, b]"
    assert verdict(verifier, method, problem) == "CORRECT"
    assert verdict(verifier, "def pair(a, b): return [b, a]", problem) == "WRONG"
    number = scripts([[1]], [[True]], fn_name="f")
    assert verdict(verifier, "def f(a): return a", number) == "WRONG"


def test_a_file_of_lines_gets_one_verdict_a_line_whatever_happens(tmp_path):
    mbpp = {"test_list": ["assert add(1, 2) == 3"], "test_setup_code": "", "entry_point": "add"}
    human = {
        "prompt": "def add(a, b):\n    '''Adds.'''\n",
        "test": "def check(f):\n    assert f(1, 2) == 3\n",
        "entry_point": "add",
    }
    lines = [
        mbpp | {"completion": "```python\ndef add(a, b): return a + b\n```"},
        human | {"completion": "    return a + b\n", "metadata": {"seen": 1}},
        human | {"completion": "    import os\n    os._exit(0)\n"},
        mbpp | {"completion": "```python\ndef add(a, b):\n    import os\n    os.fork()\n```"},
        mbpp | {"completion": "nothing"},
        {"completion": "def add(a, b): return 3"},
        mbpp | {"completion": 3},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines) + "not JSON\n")
    verify_file(SPEC, source, target)
    kinds = [json.loads(line)["verdict"] for line in target.read_text().splitlines()]
    assert kinds == ["CORRECT", "CORRECT", "WRONG", "WRONG", "NO_ANSWER", "ERROR", "ERROR", "ERROR"]


def children_of(pid):
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(place.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(place.parent.name))
        except OSError:
            continue
    return found + [grandchild for child in found for grandchild in children_of(child)]


def test_nothing_outlives_a_worker_that_is_killed():
    with VerifierPool(SPEC) as pool:
        pool.verify_all([(ADD, "```python\ndef add(a, b): return 3\n```")])
        pool.submit("lost", ADD, "```python\nwhile True: pass\ndef add(a, b): pass\n```")
        pool.poll(0.3)
        (worker,) = [child.process.pid for child in pool._workers]
        below = children_of(worker)
        assert len(below) >= 4
        os.kill(worker, signal.SIGKILL)
        end = time.monotonic() + 10.0
        while any(Path(f"/proc/{pid}").exists() for pid in below) and time.monotonic() < end:
            time.sleep(0.05)
            left = [pid for pid in below if Path(f"/proc/{pid}").exists()]
        assert left == []


def test_a_bad_setting_is_a_user_error():
    with pytest.raises(UserError, match="memory_mib"):
        CodeVerifier(memory_mib=0)
    with pytest.raises(UserError, match="min_isolation"):
        CodeVerifier(min_isolation="docker")
