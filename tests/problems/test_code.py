import ast
import gzip
import json
from pathlib import Path

import pytest

from restem_lightning.errors import UserError
from restem_lightning.problems import APPS, MBPP, HumanEval, check_splits
from restem_lightning.problems.code import MBPP_SPLITS, code_fields, entry_point_of
from restem_lightning.verifiers.programs import extract_program

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data sets at {DATA}")

MBPP_ROW = {
    "task_id": 601,
    "text": "Write a function that doubles a number.",
    "code": "def twice(x):\r\n    return 2 * x",
    "test_setup_code": "",
    "test_list": ["assert twice(1) == 2", "assert twice(4) == 8"],
    "challenge_test_list": ["assert twice(-1) == -2"],
}
HUMANEVAL_ROW = {
    "task_id": "HumanEval/0",
    "prompt": 'def twice(x: int) -> int:\n    """Doubles x."""\n',
    "entry_point": "twice",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
}
STDIN = {"inputs": ["1\n", "2\n"], "outputs": ["2\n", "4\n"]}
CALLS = {"fn_name": "twice", "inputs": [[1], [2]], "outputs": [2, 4]}


def apps_row(difficulty="introductory", cases=STDIN, **changes):
    return {
        "question": "Double it.",
        "input_output": json.dumps(cases) if cases is not None else "",
        "difficulty": difficulty,
        "starter_code": "",
        "solutions": json.dumps(["print(2 * int(input()))", "print(int(input()) + 1)"]),
        **changes,
    }


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load_apps(tmp_path, rows, **settings):
    write(tmp_path / "train.jsonl", rows)
    return APPS(str(tmp_path), "train", **settings).load()


def test_an_mbpp_problem_shows_one_test_and_is_judged_by_all(tmp_path):
    write(tmp_path / "mbpp.jsonl", [MBPP_ROW])
    (problem,) = MBPP(str(tmp_path), "train").load()
    assert problem.question == (
        "Write a function that doubles a number.\nIt should pass:\nassert twice(1) == 2"
    )
    assert problem.tests == "assert twice(1) == 2\nassert twice(4) == 8\nassert twice(-1) == -2"
    assert problem.reference_solution == "def twice(x):\n    return 2 * x"
    assert (problem.problem_id, problem.entry_point) == ("mbpp/601", "twice")
    (problem,) = MBPP(str(tmp_path), "train", num_shown=2).load()
    assert problem.question.endswith("assert twice(1) == 2\nassert twice(4) == 8")


def test_setup_code_stands_before_the_asserts(tmp_path):
    row = {**MBPP_ROW, "test_setup_code": "one = 1\r\n", "test_list": ["assert twice(one) == 2"]}
    write(tmp_path / "mbpp.jsonl", [row])
    (problem,) = MBPP(str(tmp_path), "train").load()
    assert problem.tests.startswith("one = 1\n")
    assert problem.tests.endswith("assert twice(one) == 2\nassert twice(-1) == -2")


def test_the_sanitized_format_is_read_too(tmp_path):
    row = {k: MBPP_ROW[k] for k in ("task_id", "code", "test_list")}
    row |= {"prompt": "Double.", "test_imports": ["import math"]}
    path = write(tmp_path / "any.jsonl", [row])
    (problem,) = MBPP(str(path), "train").load()
    assert problem.question.startswith("Double.\n")
    assert problem.tests == "import math\nassert twice(1) == 2\nassert twice(4) == 8"


def test_mbpp_splits_are_those_of_the_data_set(tmp_path):
    ids = (1, 10, 11, 510, 511, 600, 601, 974)
    rows = [{**MBPP_ROW, "task_id": task_id} for task_id in ids]
    write(tmp_path / "mbpp.jsonl", rows)
    found = {split: MBPP(str(tmp_path), split).load() for split in MBPP_SPLITS}
    assert {split: [p.problem_id for p in some] for split, some in found.items()} == {
        "prompt": ["mbpp/1", "mbpp/10"],
        "test": ["mbpp/11", "mbpp/510"],
        "validation": ["mbpp/511", "mbpp/600"],
        "train": ["mbpp/601", "mbpp/974"],
    }


def test_a_humaneval_problem_calls_check_and_keeps_its_prompt(tmp_path):
    write(tmp_path / "humaneval.jsonl", [HUMANEVAL_ROW])
    (problem,) = HumanEval(str(tmp_path)).load()
    prompt = HUMANEVAL_ROW["prompt"]
    assert problem.tests == HUMANEVAL_ROW["test"] + "\n\ncheck(twice)"
    assert problem.question == problem.metadata["prompt"] == prompt
    assert problem.reference_solution == prompt + "    return 2 * x\n"
    (problem,) = HumanEval(str(tmp_path), question_format="Do:\n{prompt}").load()
    assert (problem.question, problem.metadata["prompt"]) == (f"Do:\n{prompt}", prompt)


def test_an_apps_problem_of_standard_input_keeps_its_cases(tmp_path):
    (problem,) = load_apps(tmp_path, [apps_row()])
    assert problem.metadata["input_output"] == STDIN
    assert (problem.tests, problem.entry_point) == (None, None)
    assert problem.reference_solution == "print(2 * int(input()))"
    assert "standard input" in problem.question


def test_an_apps_problem_of_calls_names_its_function_and_shows_the_starter_code(tmp_path):
    row = apps_row(cases=CALLS, starter_code="def twice(x):\n\t")
    (problem,) = load_apps(tmp_path, [row])
    assert problem.metadata["input_output"] == CALLS
    assert problem.entry_point == "twice"
    assert problem.question == "Double it.\n\nWrite the function twice.\nBegin with:\ndef twice(x):"


def test_apps_is_filtered_by_difficulty_and_keeps_the_row_in_its_ids(tmp_path):
    rows = [apps_row("interview"), apps_row(), apps_row("competition"), apps_row()]
    assert [p.problem_id for p in load_apps(tmp_path, rows)] == ["apps/train/1", "apps/train/3"]
    hard = load_apps(tmp_path, rows, difficulty="competition")
    assert [p.problem_id for p in hard] == ["apps/train/2"]
    assert len(load_apps(tmp_path, rows, difficulty=None)) == 4


def test_apps_rows_without_usable_tests_are_dropped_and_counted(tmp_path, caplog):
    odd = {"inputs": ["1"], "outputs": []}
    rows = [apps_row(), apps_row(cases=None), apps_row(cases=odd), apps_row(cases={"inputs": []})]
    assert len(load_apps(tmp_path, rows)) == 1
    assert "dropped 3" in caplog.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: MBPP("x", "dev"), "split .dev. of MBPP must be one of prompt, test"),
        (lambda _: MBPP("x", "train", num_shown=0), r"num_shown \(0\)"),
        (lambda _: APPS("x", "train", difficulty="easy"), "introductory, interview, competition"),
        (lambda _: HumanEval("x", question_format="Do"), "must hold {prompt}"),
        (lambda folder: MBPP(str(folder), "train").load(), "has no mbpp.jsonl"),
        (lambda folder: MBPP(str(folder / "row.jsonl"), "train").load(), "is this MBPP"),
        (lambda folder: HumanEval(str(folder / "row.jsonl")).load(), "no text field 'prompt'"),
    ],
)
def test_a_users_mistake_is_named(tmp_path, make, message):
    write(tmp_path / "row.jsonl", [{"question": "q"}])
    with pytest.raises(UserError, match=message):
        make(tmp_path)


@pytest.mark.parametrize(
    ("asserts", "name"),
    [
        (["assert f(1) == 2", "assert f(3) == 4"], "f"),
        (["assert set(f(1)) == set([2])"], "f"),
        (["assert f([A(1), A(2)]) == 2", "assert f([A(3)]) == 2"], "f"),
        (["assert math.isclose(f(1.5), 2, rel_tol=0.1)"], "f"),
        (["assert sum(10, 15) == 6"], "sum"),
        (["assert not f(g(1))", "assert f(2)"], "f"),
        (["assert (f(x)) == 3"], "f"),
    ],
)
def test_the_entry_point_is_what_all_asserts_call(asserts, name):
    assert entry_point_of(asserts) == name


@pytest.mark.parametrize("asserts", [["assert x"], ["assert f(1)", "assert g(1)"], ["assert f("]])
def test_asserts_without_a_common_function_are_refused(asserts):
    with pytest.raises(UserError):
        entry_point_of(asserts)


@pytest.mark.parametrize(
    "row",
    [
        {"test": 1, "prompt": "", "entry_point": "f"},
        {"test": "def check(c): pass", "prompt": ""},
        {"test_list": []},
        {"test_list": "assert f(1)"},
        {"test_list": ["assert f(1)"], "test_setup_code": 3},
        {"test_list": ["assert f(1)"], "entry_point": 3},
        {"input_output": "{"},
        {"input_output": []},
        {"input_output": {"inputs": [1], "outputs": [1, 2]}},
        {"input_output": {"inputs": [1], "outputs": [1], "fn_name": 3}},
        {},
    ],
)
def test_a_row_of_another_form_is_refused(row):
    with pytest.raises(UserError):
        code_fields(row)


@needs_data
def test_mbpp_itself_is_read_whole_and_its_splits_are_disjoint():
    splits = {split: MBPP(str(DATA / "mbpp"), split).load() for split in MBPP_SPLITS}
    counts = {split: len(problems) for split, problems in splits.items()}
    assert counts == {"prompt": 10, "test": 500, "validation": 90, "train": 374}
    check_splits(splits)
    for problem in (problem for problems in splits.values() for problem in problems):
        assert problem.entry_point in _names(problem.reference_solution)


@needs_data
def test_sanitized_mbpp_itself_is_read_whole():
    path = str(DATA / "mbpp" / "sanitized-mbpp.jsonl.gz")
    problems = [p for split in MBPP_SPLITS for p in MBPP(path, split).load()]
    assert len(problems) == 427
    assert all(p.entry_point in _names(p.reference_solution) for p in problems)


@needs_data
def test_humaneval_itself_is_read_whole():
    problems = HumanEval(str(DATA / "humaneval")).load()
    assert len(problems) == 164
    assert all(p.entry_point in _names(p.reference_solution) for p in problems)


@needs_data
def test_a_reference_is_found_whole_in_every_kind_of_completion():
    problems = HumanEval(str(DATA / "humaneval")).load()
    problems += [p for split in MBPP_SPLITS for p in MBPP(str(DATA / "mbpp"), split).load()]
    for problem in problems:
        reference = problem.reference_solution
        wanted = _definitions(reference)
        for text in (
            reference,
            f"So:\n```python\n{reference}\n```\n",
            f"So:\n\n{reference}\nDone.",
        ):
            program = extract_program(text, problem)
            assert _definitions(program) == wanted, (problem.problem_id, text)


@needs_data
def test_a_bare_body_of_humaneval_goes_on_with_its_prompt():
    problems = HumanEval(str(DATA / "humaneval")).load()
    with gzip.open(DATA / "humaneval" / "humaneval.jsonl.gz") as file:
        bodies = [json.loads(line)["canonical_solution"] for line in file]
    for problem, body in zip(problems, bodies, strict=True):
        program = extract_program(f"{body}\n\ndef main() -> Unknown:\n    pass\n", problem)
        assert _definitions(program) == _definitions(problem.reference_solution)


def _names(source):
    kinds = ast.FunctionDef | ast.ClassDef
    return {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)}


def _definitions(source):
    """All top-level statements but those that only run something."""
    nodes = ast.parse(source).body
    return [ast.dump(node) for node in nodes if not isinstance(node, ast.Expr)]
