import gzip
import json
import subprocess
import sys

import pytest

from restem_lightning.errors import UserError
from restem_lightning.problems import (
    GSM8K,
    MATH,
    JsonlProblems,
    Problem,
    ReasoningGym,
    check_splits,
    read_problems,
    without_questions_of,
    write_problems,
)
from restem_lightning.problems.math import last_boxed


def problem(problem_id="a", question="What is 1+1?", **values):
    return Problem(problem_id=problem_id, question=question, **values)


def write_rows(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture
def gsm8k(tmp_path):
    answers = ["2+2=<<2+2=4>>4\n#### 4", "so\n#### 1,234", "so\n#### -7", "so\n#### 0"]
    rows = [{"question": f"q{i}", "answer": answer} for i, answer in enumerate(answers)]
    write_rows(tmp_path / "train.jsonl.gz", rows)
    write_rows(tmp_path / "test.jsonl", [{"question": "t", "answer": "#### 9"}])
    return tmp_path


@pytest.fixture
def math(tmp_path):
    rows = [
        {"problem": "p0", "solution": r"\boxed{1} so \boxed{\frac{1}{2}}.", "level": "Level 1"},
        {"problem": "p1", "solution": r"nothing: \boxed{}", "level": "Level ?"},
        {"problem": "p2", "solution": r"so $\boxed 5$.", "level": 5, "subject": "Algebra"},
        {"problem": "p3", "solution": "no box", "level": "Level 5", "type": "Algebra"},
        {"problem": "p4", "solution": r"\boxed{\{1,2\}}", "level": "Level 5", "type": "Geometry"},
    ]
    write_rows(tmp_path / "train.jsonl", rows)
    return tmp_path


@pytest.mark.parametrize("name", ["problems.jsonl", "deep/problems.jsonl.gz"])
def test_problems_survive_a_round_trip(tmp_path, name):
    problems = [
        problem("a", reference_answer="2", split="train", metadata={"x": [1, None]}),
        problem("b", "\u00e9\u2028\ud800", tests="assert f(1)", entry_point="f"),
    ]
    write_problems(tmp_path / name, problems)
    assert read_problems(tmp_path / name) == problems
    assert [path.name for path in (tmp_path / name).parent.iterdir()] == [name.split("/")[-1]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"problem_id": "b", "question": "q", "answer": "1"}', "line 2: unknown key 'answer'"),
        (
            '{"problem_id": "a", "question": "q"}',
            "line 2: problem_id 'a' is already used in line 1",
        ),
        ('{"problem_id": "b"}', "line 2: question must be"),
        ('{"problem_id": 7, "question": "q"}', "line 2: problem_id must be"),
        ('{"problem_id": "b", "question": "q", "tests": []}', "line 2: tests must be"),
        ('{"problem_id": "b", "question": "q", "metadata": []}', "line 2: metadata must be"),
        ("{", "line 2 is not a JSON object"),
        ("[]", "line 2 is not a JSON object"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(tmp_path, line, message):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"problem_id": "a", "question": "q"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        read_problems(path)


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(b"{}\n", mtime=0)[:12]])
def test_a_damaged_compressed_file_is_the_users_mistake(tmp_path, content):
    path = tmp_path / "problems.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"problems\.jsonl\.gz is no whole \.gz file"):
        read_problems(path)


def test_a_missing_file_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jsonl is not a file"):
        read_problems(tmp_path / "nowhere.jsonl")


def test_jsonl_problems_selects_split_and_number(tmp_path):
    path = tmp_path / "problems.jsonl"
    write_problems(path, [problem(str(i), split="ab"[i % 2]) for i in range(6)])
    assert [p.problem_id for p in JsonlProblems(str(path), split="b", num=2).load()] == ["1", "3"]
    with pytest.raises(UserError, match="no split 'c'"):
        JsonlProblems(str(path), split="c").load()
    with pytest.raises(UserError, match=r"num \(4\)"):
        JsonlProblems(str(path), split="b", num=4).load()


def test_gsm8k_answers_are_the_numbers_after_the_mark(gsm8k):
    problems = GSM8K(str(gsm8k), "train").load()
    assert [p.reference_answer for p in problems] == ["4", "1234", "-7", "0"]
    assert [p.problem_id for p in problems] == [f"gsm8k/train/{i}" for i in range(4)]
    assert problems[0].question == "q0"
    assert problems[0].reference_solution == "2+2=<<2+2=4>>4\n#### 4"
    assert {(p.split, p.source) for p in problems} == {("train", "gsm8k")}
    assert GSM8K(str(gsm8k / "test.jsonl"), "test").load()[0].reference_answer == "9"


def test_slices_of_one_split_are_disjoint_and_keep_their_ids(gsm8k):
    first, second = GSM8K(str(gsm8k), "train", num=3), GSM8K(str(gsm8k), "train", offset=3)
    assert [p.problem_id for p in first.load()] == [f"gsm8k/train/{i}" for i in range(3)]
    assert [p.problem_id for p in second.load()] == ["gsm8k/train/3"]


@pytest.mark.parametrize(("offset", "num"), [(4, None), (-1, 2), (0, 0), (2, 3)])
def test_a_slice_outside_the_split_is_refused(gsm8k, offset, num):
    with pytest.raises(UserError, match="do not fit"):
        GSM8K(str(gsm8k), "train", offset=offset, num=num).load()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda folder: GSM8K(str(folder), "validation"), "has no validation.jsonl"),
        (lambda folder: GSM8K(str(folder / "x.jsonl"), "test"), "is not a file"),
        (lambda folder: GSM8K(str(folder / "x" / "y"), "test"), "is not a file"),
        (lambda folder: MATH(str(folder), "test"), "no text field 'solution'"),
    ],
)
def test_a_wrong_path_or_format_is_the_users_mistake(gsm8k, source, message):
    with pytest.raises(UserError, match=message):
        source(gsm8k).load()


def test_a_hub_data_set_without_the_library_is_refused_with_the_remedy():
    code = """
import sys
sys.modules["datasets"] = None
from restem_lightning.errors import UserError
from restem_lightning.problems import GSM8K
try:
    GSM8K("openai/gsm8k", "train").load()
except UserError as error:
    assert "pip install datasets" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_math_answers_are_the_last_boxes_and_rows_without_one_are_dropped(math, caplog):
    problems = MATH(str(math), "train").load()
    assert [(p.problem_id, p.reference_answer) for p in problems] == [
        ("math/train/0", r"\frac{1}{2}"),
        ("math/train/2", "5"),
        ("math/train/4", r"\{1,2\}"),
    ]
    assert [p.metadata["level"] for p in problems] == [1, 5, 5]
    assert "dropped 2 without an answer: math/train/1, math/train/3" in caplog.text


def test_slices_of_a_shuffled_math_are_disjoint_and_mixed(tmp_path):
    rows = [
        {"problem": f"p{n}", "solution": r"\boxed{1}", "type": str(n // 50)} for n in range(100)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = (
        MATH(str(tmp_path), "train", num=50, offset=offset, shuffle_seed=0).load()
        for offset in (0, 50)
    )
    assert {p.problem_id for p in first + second} == {f"math/train/{n}" for n in range(100)}
    assert first[0].question == "p" + first[0].problem_id.removeprefix("math/train/")
    for part in (first, second):
        assert 15 < sum(p.metadata["subject"] == "0" for p in part) < 35


def test_math_filters_by_subject_and_level(math):
    assert [p.question for p in MATH(str(math), "train", level=5).load()] == ["p2", "p4"]
    assert [p.question for p in MATH(str(math), "train", subject="Algebra").load()] == ["p2"]
    with pytest.raises(UserError, match="no level 3"):
        MATH(str(math), "train", level=3).load()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{a{b}c} x", "a{b}c"),
        (r"\boxed{1}, \fbox{2}", "2"),
        (r"\boxed {3}", "3"),
        (r"\boxed 4.", "4"),
        (r"\boxed{\{x\}}", r"\{x\}"),
        (r"\boxed{a\\}", r"a\\"),
        (r"\boxed{open", None),
        (r"\boxed", None),
        ("none", None),
    ],
)
def test_last_boxed(text, expected):
    assert last_boxed(text) == expected


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"They meet at $\boxed{(-2,18)}$ and $\boxed{(8,38)}$.", "(-2,18), (8,38)"),
        (r"so $k=\boxed{12}$ and $k = \boxed{18}$.", "12, 18"),
        (r"$\boxed{28}$ or $\boxed{28_9}$", "28_9"),  # the benchmark's own answer
        (r"Thus $\boxed{3}$. Alternatively, again $\boxed{3}$.", "3"),
    ],
)
def test_boxes_that_and_joins_are_one_reference_answer(tmp_path, solution, answer):
    row = {"problem": "p", "solution": solution}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    (problem,) = MATH(str(tmp_path), "train").load()
    assert problem.reference_answer == answer


def test_generated_problems_are_the_same_at_every_call():
    first, again = (ReasoningGym("chain_sum", seed=7, num=3, split="s").load() for _ in range(2))
    assert first == again
    assert [p.problem_id for p in first] == [f"chain_sum/7/{i}" for i in range(3)]
    assert {(p.split, p.source) for p in first} == {("s", "reasoning_gym")}


def test_what_a_task_prints_while_it_generates_does_no_harm():
    assert len(ReasoningGym("bf", seed=1, num=2).load()) == 2


def test_neighbouring_seeds_generate_different_problems():
    train, held_out = (ReasoningGym("chain_sum", seed=seed, num=50).load() for seed in (1, 2))
    assert {p.question for p in train}.isdisjoint(p.question for p in held_out)


@pytest.mark.parametrize(("task", "config"), [("no_such_task", {}), ("chain_sum", {"no_key": 1})])
def test_an_unknown_task_or_setting_is_refused(task, config):
    with pytest.raises(UserError, match=task):
        ReasoningGym(task, seed=1, num=1, config=config).load()


def test_splits_that_share_an_id_are_refused():
    check_splits({"train": [problem("a", "x"), problem("b", "x")], "held_out": [problem("c", "y")]})
    with pytest.raises(UserError, match="'train' and 'held_out' share the problem_id 'a'"):
        check_splits({"train": [problem("a", "x")], "held_out": [problem("a", "y")]})


def test_a_question_that_others_ask_as_well_is_dropped():
    problems = [problem("a", "x  y"), problem("b", "x"), problem("c", "z")]
    kept, dropped = without_questions_of(problems, [problem("d", "x y\n"), problem("e", "z")])
    assert [one.problem_id for one in kept] == ["b"]
    assert [one.problem_id for one in dropped] == ["a", "c"]


def test_importing_problems_imports_nothing_heavy():
    code = """
import sys, restem_lightning.problems
heavy = {"torch", "numpy", "datasets", "reasoning_gym", "pyarrow"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
