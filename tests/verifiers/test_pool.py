import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from restem_lightning.completions import Verdict, VerdictKind
from restem_lightning.errors import UserError
from restem_lightning.problems import Problem
from restem_lightning.verifiers import VerifierPool, VerifierSpec, check_references

VERIFIERS = """
import os, sys, time
from restem_lightning.completions import Verdict, VerdictKind

def judge(problem, text):
    if text == "hang":
        while True:
            pass
    if text == "sleep":
        time.sleep(0.3)
    if text == "memory":
        return len(bytearray(1 << 40)) > 0
    if text == "die":
        os._exit(3)
    if text == "exit":
        sys.exit(0)
    if text == "raise":
        raise RuntimeError("broken")
    if text == "print":
        print("noise"); sys.stdout.flush(); os.write(1, b"noise")
        return sys.stdin.read() == ""
    if text == "odd":
        return 1
    if text.startswith("reward "):
        return Verdict(kind=VerdictKind.WRONG, reward=float(text.removeprefix("reward ")))
    if text == "pid":
        return Verdict(kind=VerdictKind.CORRECT, extracted=str(os.getpid()))
    return text == problem.reference_answer

class Counting:
    name, version = "counting", "1"
    calls = 0
    def verify(self, problem, text):
        Counting.calls += 1
        return Verdict(kind=VerdictKind.WRONG, extracted=str(Counting.calls))
    def cache_key(self, problem, text):
        return (text,)
    def reference_completion(self, problem):
        return None

class Quick(Counting):
    def quick_verdict(self, cache_key):
        if cache_key == ("broken",):
            raise RuntimeError
        return Verdict(kind=VerdictKind.CORRECT) if cache_key == ("easy",) else None

class Greedy(Counting):
    def warm_up(self):
        bytearray(1 << 40)
"""
PROBLEM = Problem(problem_id="p", question="q", reference_answer="yes", reference_solution="yes")


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(VERIFIERS)
    return VerifierSpec(
        class_path="restem_lightning.verifiers.CallableVerifier",
        init_args={"function": f"{path}:judge"},
    )


def kinds(verdicts):
    return [verdict.kind.value for verdict in verdicts]


def test_verdicts_come_in_the_order_of_the_pairs(spec):
    texts = ["sleep", *(["yes", "no"] * 200)]
    with VerifierPool(spec, num_workers=2) as pool:
        verdicts = pool.verify_all([(PROBLEM, text) for text in texts])
    assert kinds(verdicts) == ["WRONG"] + ["CORRECT", "WRONG"] * 200


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("raise", "RuntimeError: broken"),
        ("memory", "MemoryError"),
        ("exit", "SystemExit"),
        ("die", "status 3"),
        ("odd", "must return a bool or a Verdict"),
    ],
)
def test_a_failing_verifier_gives_error_for_that_job_alone(spec, text, detail):
    with VerifierPool(spec) as pool:
        verdicts = pool.verify_all([(PROBLEM, "yes"), (PROBLEM, text), (PROBLEM, "yes")])
    assert kinds(verdicts) == ["CORRECT", "ERROR", "CORRECT"]
    assert detail in verdicts[1].detail


def test_a_reward_of_the_verifier_s_own_comes_back_and_must_be_finite(spec):
    with VerifierPool(spec) as pool:
        mine, bad = pool.verify_all([(PROBLEM, "reward -0.3"), (PROBLEM, "reward nan")])
    assert (mine.kind, mine.reward) == (VerdictKind.WRONG, -0.3)
    assert (bad.kind, bad.reward) == (VerdictKind.ERROR, 0.0)
    assert "reward (nan) must be finite" in bad.detail


def test_output_of_a_verifier_does_not_disturb_the_pool(spec):
    with VerifierPool(spec) as pool:
        assert kinds(pool.verify_all([(PROBLEM, "print")] * 3)) == ["CORRECT"] * 3


def test_a_hang_is_a_timeout_and_the_other_jobs_of_its_batch_are_judged(spec):
    texts = ["yes"] * 50 + ["hang"] + ["yes"] * 50
    with VerifierPool(spec, deadline_s=0.5) as pool:
        pool.verify_all([(PROBLEM, "yes")])
        start = time.monotonic()
        verdicts = pool.verify_all([(PROBLEM, text) for text in texts])
        elapsed_s = time.monotonic() - start
        assert kinds(pool.verify_all([(PROBLEM, "yes")])) == ["CORRECT"]
    assert kinds(verdicts) == ["CORRECT"] * 50 + ["TIMEOUT"] + ["CORRECT"] * 50
    assert 0.5 <= verdicts[50].elapsed_s < 1.5
    assert elapsed_s < 5.0


def test_a_hang_is_a_timeout_off_the_main_thread(spec):
    verdicts: list[Verdict] = []

    def work():
        with VerifierPool(spec, deadline_s=0.3) as pool:
            verdicts.extend(pool.verify_all([(PROBLEM, "hang"), (PROBLEM, "yes")]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert kinds(verdicts) == ["TIMEOUT", "CORRECT"]


def test_cpu_seconds_bound_a_job_too(spec):
    with VerifierPool(spec, deadline_s=30.0, cpu_s=0.2) as pool:
        assert kinds(pool.verify_all([(PROBLEM, "hang"), (PROBLEM, "yes")])) == [
            "TIMEOUT",
            "CORRECT",
        ]


def test_start_up_does_not_count_against_the_deadline(spec):
    with VerifierPool(spec, deadline_s=0.02) as pool:
        assert kinds(pool.verify_all([(PROBLEM, "yes")])) == ["CORRECT"]


def test_a_killed_worker_is_replaced(spec):
    with VerifierPool(spec, deadline_s=30.0) as pool:
        pid = int(pool.verify_all([(PROBLEM, "pid")])[0].extracted)
        pool.submit("lost", PROBLEM, "hang")
        pool.poll(0.1)
        os.kill(pid, signal.SIGKILL)
        ((key, verdict),) = pool.drain()
        assert (key, verdict.kind, verdict.detail) == (
            "lost",
            VerdictKind.ERROR,
            "the worker died with status -9",
        )
        assert int(pool.verify_all([(PROBLEM, "pid")])[0].extracted) != pid


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_workers_outlive_the_signals_that_a_scheduler_sends(spec, number):
    with VerifierPool(spec) as pool:
        pid = int(pool.verify_all([(PROBLEM, "pid")])[0].extracted)
        os.kill(pid, number)
        assert int(pool.verify_all([(PROBLEM, "pid")])[0].extracted) == pid


def test_submit_and_poll_do_not_wait_for_a_slow_job_or_a_full_pipe(spec):
    with VerifierPool(spec, deadline_s=30.0) as pool:
        pool.verify_all([(PROBLEM, "yes")] * 200)
        start = time.monotonic()
        for index in range(100):
            pool.submit(index, PROBLEM, "hang" if index == 0 else "x" * 100_000)
        assert pool.poll() == []
        assert time.monotonic() - start < 1.0
        assert pool.num_pending == 100


def test_large_jobs_and_odd_characters_arrive_whole(spec):
    answer = "\ud800\x00\u00e9" + "y" * 3_000_000
    problem = Problem(problem_id="p", question="q", reference_answer=answer)
    with VerifierPool(spec) as pool:
        assert kinds(pool.verify_all([(problem, answer), (problem, answer[1:])])) == [
            "CORRECT",
            "WRONG",
        ]


def test_equal_cache_keys_are_verified_once(spec, tmp_path):
    counting = VerifierSpec(class_path=f"{tmp_path / 'mine.py'}:Counting")
    with VerifierPool(counting) as pool:
        first = pool.verify_all([(PROBLEM, text) for text in "aabab" * 20])
        again = pool.verify_all([(PROBLEM, "a")])
    assert {verdict.extracted for verdict in first} == {"1", "2"}
    assert again[0].extracted == "1"


def test_a_quick_verdict_needs_no_worker_and_all_else_gets_one(spec, tmp_path):
    quick = VerifierSpec(class_path=f"{tmp_path}/mine.py:Quick")
    with VerifierPool(quick) as pool:
        pool.submit("easy", PROBLEM, "easy")
        assert [(key, v.kind.value) for key, v in pool.poll()] == [("easy", "CORRECT")]
        verdicts = pool.verify_all([(PROBLEM, text) for text in ("hard", "easy", "broken")])
    assert kinds(verdicts) == ["WRONG", "CORRECT", "WRONG"]
    assert [verdict.extracted for verdict in verdicts] == ["1", None, "2"]


def test_metadata_that_is_not_json_gives_error(spec):
    problem = Problem(problem_id="p", question="q", metadata={"a": object()})
    with VerifierPool(spec) as pool:
        (verdict,) = pool.verify_all([(problem, "yes")])
    assert verdict.kind is VerdictKind.ERROR
    assert "not JSON-serialisable" in verdict.detail


def test_close_leaves_no_process_and_no_descriptor(spec):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with VerifierPool(spec, num_workers=2, deadline_s=0.2) as pool:
            pool.verify_all([(PROBLEM, "hang"), (PROBLEM, "yes")])
            pids = [worker.process.pid for worker in pool._workers]
        pool.close()
        assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_hanging_worker_ends_when_its_parent_is_killed(spec, tmp_path):
    code = f"""
from restem_lightning.problems import Problem
from restem_lightning.verifiers import VerifierPool, VerifierSpec
pool = VerifierPool(VerifierSpec(class_path={spec.class_path!r}, init_args={spec.init_args!r}))
problem = Problem(problem_id="p", question="q")
print(pool.verify_all([(problem, "pid")])[0].extracted, flush=True)
pool.submit(0, problem, "hang")
pool.poll(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    time.sleep(0.1)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not is_running(pid)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("class_path", "init_args", "message"),
    [
        ("no_such_module.Verifier", {}, "cannot import"),
        ("restem_lightning.verifiers.NoSuch", {}, "has no 'NoSuch'"),
        ("nowhere.py:Verifier", {}, "is not a Python file"),
        ("Verifier", {}, "cannot import"),
        ("restem_lightning.verifiers.MathVerifier", {"answer": "x"}, "refuses init_args"),
        ("restem_lightning.verifiers.MathVerifier", {"answer_format": "x"}, "must be one of"),
        ("collections.OrderedDict", {}, "is no verifier"),
    ],
)
def test_a_bad_spec_is_refused_before_any_worker_starts(class_path, init_args, message):
    with pytest.raises(UserError, match=message):
        VerifierPool(VerifierSpec(class_path=class_path, init_args=init_args))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def judge(problem, text) return True", r"SyntaxError.*own\.py, line 1"),
        ("x = 1\nraise RuntimeError('not today')", r"RuntimeError in .*own\.py line 2: not today"),
        ("class judge:\n def __init__(self):\n  {}[3]", r"KeyError in .*own\.py line 3: 3"),
    ],
)
def test_a_file_of_the_users_that_fails_is_refused_with_its_line(tmp_path, text, message):
    path = tmp_path / "own.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        VerifierPool(VerifierSpec(class_path=f"{path}:judge"))


def test_too_little_memory_to_start_is_reported_with_the_remedy(spec, tmp_path):
    with (
        VerifierPool(VerifierSpec(class_path=f"{tmp_path / 'mine.py'}:Greedy")) as pool,
        pytest.raises(UserError, match="memory_bytes"),
    ):
        pool.verify_all([(PROBLEM, "yes")])


def test_a_verifier_in_the_working_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_verifier_module.py").write_text(VERIFIERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with VerifierPool(VerifierSpec(class_path="my_verifier_module.Counting")) as pool:
        assert kinds(pool.verify_all([(PROBLEM, "a")])) == ["WRONG"]


def test_problems_whose_reference_is_refused_are_dropped(spec):
    refused = Problem(
        problem_id="bad", question="q", reference_answer="yes", reference_solution="no"
    )
    unchecked = Problem(problem_id="free", question="q")
    with VerifierPool(spec) as pool:
        kept, dropped = check_references([PROBLEM, refused, unchecked], pool)
    assert kept == [PROBLEM, unchecked]
    assert [(problem, verdict.kind) for problem, verdict in dropped] == [
        (refused, VerdictKind.WRONG)
    ]


def test_importing_and_using_verifiers_imports_no_torch():
    code = """
import sys
from restem_lightning.problems import Problem
from restem_lightning.verifiers import MathVerifier, ProceduralVerifier
math, procedural = MathVerifier(), ProceduralVerifier()
heavy = {"sympy", "reasoning_gym"} & set(sys.modules)
assert not heavy, heavy
math.warm_up(), procedural.warm_up()
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
