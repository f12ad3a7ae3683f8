import gzip
import json

import pytest

from restem_lightning.errors import UserError
from restem_lightning.verifiers import VerifierSpec, batch, verify_file

MATH = VerifierSpec(class_path="restem_lightning.verifiers.MathVerifier", init_args={})


def run(tmp_path, lines, spec=MATH, **settings):
    source, target = tmp_path / "in.jsonl", tmp_path / "out" / "verdicts.jsonl"
    source.write_bytes(b"".join(line + b"\n" for line in lines))
    counts = verify_file(spec, source, target, **settings)
    return [json.loads(line) for line in target.read_text().splitlines()], counts


def line(**values):
    return json.dumps(values).encode()


def test_each_line_gets_its_verdict_in_input_order(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "MAX_PENDING_LINES", 7)
    lines = [
        line(
            problem_id=f"p{index}",
            case_id=index,
            completion=f"#### {index % 3}",
            reference_answer="1",
            note="ignored",
        )
        for index in range(100)
    ]
    rows, counts = run(tmp_path, lines, num_workers=2)
    assert [row["case_id"] for row in rows] == list(range(100))
    assert [row["problem_id"] for row in rows] == [f"p{index}" for index in range(100)]
    expected = ["CORRECT" if index % 3 == 1 else "WRONG" for index in range(100)]
    assert [row["verdict"] for row in rows] == expected
    assert [row["reward"] for row in rows] == [float(kind == "CORRECT") for kind in expected]
    assert [row["extracted"] for row in rows] == [str(index % 3) for index in range(100)]
    assert counts == {"CORRECT": 33, "WRONG": 67, "NO_ANSWER": 0, "TIMEOUT": 0, "ERROR": 0}
    assert set(rows[0]) == {
        *("problem_id", "case_id", "verdict", "reward", "extracted", "detail", "elapsed_s")
    }


@pytest.mark.parametrize(
    ("malformed", "detail"),
    [
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "not a JSON object"),
        (line(problem_id="p", reference_answer="1"), "completion is missing"),
        (line(problem_id="p", reference_answer="1", completion=5), "completion is missing"),
        (line(reference_answer="1", completion="#### 1"), "problem_id must be"),
        (line(problem_id=["p"], reference_answer="1", completion="#### 1"), "problem_id must be"),
        (line(problem_id="p", completion="#### 1"), "no reference_answer"),
        (line(problem_id="p", completion="#### 1", reference_answer=[1]), "reference_answer must"),
        (line(problem_id="p", completion="#### 1", metadata=3), "metadata must be"),
    ],
)
def test_a_malformed_line_is_an_error_that_names_the_fault(tmp_path, malformed, detail):
    good = line(problem_id="good", reference_answer="1", completion="#### 1")
    rows, _ = run(tmp_path, [good, malformed, good])
    assert [row["verdict"] for row in rows] == ["CORRECT", "ERROR", "CORRECT"]
    assert rows[1]["reward"] == 0.0
    assert detail in rows[1]["detail"]


def test_a_number_may_stand_for_the_reference_answer(tmp_path):
    rows, _ = run(tmp_path, [line(problem_id="p", reference_answer=12, completion="#### 12")])
    assert rows[0]["verdict"] == "CORRECT"


def test_raw_rows_of_code_data_sets_become_problems(tmp_path):
    path = tmp_path / "show.py"
    path.write_text(
        "from restem_lightning.completions import Verdict, VerdictKind\n"
        "def judge(problem, text):\n"
        "    seen = [problem.problem_id, problem.tests, problem.entry_point, problem.metadata]\n"
        "    return Verdict(kind=VerdictKind.CORRECT, extracted=repr(seen))"
    )
    spec = VerifierSpec(
        class_path="restem_lightning.verifiers.CallableVerifier",
        init_args={"function": f"{path}:judge"},
    )
    cases = {"inputs": ["1"], "outputs": ["2"]}
    lines = [
        line(
            problem_id="h",
            completion="",
            entry_point="f",
            prompt="def f():\n",
            test="def check(c): 0",
        ),
        line(task_id=11, completion="", test_list=["assert g(1)"], test_setup_code="", code="x"),
        line(problem_id="m", completion="", test_list=["assert 1"], entry_point="g"),
        line(problem_id="a", completion="", input_output=json.dumps(cases)),
        line(problem_id="bad", completion="", test_list=["assert 1"]),
        line(problem_id="bad", completion="", test_list=3, entry_point="g"),
    ]
    rows, counts = run(tmp_path, lines, spec)
    assert [eval(row["extracted"]) for row in rows[:4]] == [
        ["h", "def check(c): 0\n\ncheck(f)", "f", {"prompt": "def f():\n"}],
        ["11", "assert g(1)", "g", {}],
        ["m", "assert 1", "g", {}],
        ["a", None, None, {"input_output": cases}],
    ]
    assert counts["ERROR"] == 2
    assert [row["problem_id"] for row in rows] == ["h", None, "m", "a", "bad", "bad"]
    assert "no function in common" in rows[4]["detail"]
    assert "test_list must be" in rows[5]["detail"]


def test_a_hanging_line_is_a_timeout(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def judge(problem, text):\n    while text == 'hang':\n        pass\n    return True"
    )
    spec = VerifierSpec(
        class_path="restem_lightning.verifiers.CallableVerifier",
        init_args={"function": f"{path}:judge"},
    )
    lines = [line(problem_id="p", completion=text) for text in ("ok", "hang", "ok")]
    rows, _ = run(tmp_path, lines, spec, deadline_s=0.3)
    assert [row["verdict"] for row in rows] == ["CORRECT", "TIMEOUT", "CORRECT"]


def test_compressed_files_are_read_and_written(tmp_path):
    source, target = tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl.gz"
    with gzip.open(source, "wb") as file:
        file.write(line(problem_id="p", reference_answer="1", completion="#### 1") + b"\n")
    verify_file(MATH, source, target)
    with gzip.open(target) as file:
        assert [json.loads(row)["verdict"] for row in file] == ["CORRECT"]


def test_a_damaged_compressed_file_is_the_users_mistake(tmp_path):
    source, target = tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl"
    source.write_bytes(gzip.compress(b"{}\n" * 99)[:20])
    with pytest.raises(UserError, match=r"in\.jsonl\.gz is no whole \.gz file"):
        verify_file(MATH, source, target)
    assert not target.exists()


def test_a_failure_leaves_an_earlier_output_as_it_was(tmp_path):
    target = tmp_path / "out.jsonl"
    target.write_text("earlier")
    with pytest.raises(UserError, match="is not a file"):
        verify_file(MATH, tmp_path / "missing.jsonl", target)
    source = tmp_path / "in.jsonl"
    source.write_text("{}")
    with pytest.raises(UserError, match="cannot import"):
        verify_file(VerifierSpec(class_path="no.such.Thing"), source, target)
    assert target.read_text() == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
