"""The command line as a user meets it: help, verbs, and one line for each mistake."""

import json
import shutil

import pytest

from restem_lightning import __version__
from restem_lightning.cli import VERBS
from restem_lightning.completion_store import CompletionStore
from restem_lightning.problems import WordProblems, write_problems
from restem_lightning.run_dir import RunDir, read_json
from restem_lightning.settings import EMBEDDED_POLICY
from tests.conftest import check_line

JSONL = "restem_lightning.problems.JsonlProblems"
SMALL = (
    "--sampling.max_new_tokens",
    "24",
    "--engine.max_batch_size",
    "64",
    "--engine.device",
    "cpu",
)


def source(class_path, **init_args):
    return json.dumps({"class_path": class_path, "init_args": init_args})


@pytest.fixture
def problems(tmp_path):
    """A JSONL file of 12 problems."""
    path = tmp_path / "some.problems.jsonl"
    write_problems(path, WordProblems("held_out", 12).load())
    return path


@pytest.fixture
def python_file(tmp_path):
    """Writes a function f(problem, text) to a file and returns its path with the name."""

    def write(body):
        path = tmp_path / "own.py"
        path.write_text(f"def f(problem, text):\n    {body}\n")
        return f"{path}:f"

    return write


# --- help ---


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_without_a_verb_all_verbs_are_explained(words, restem):
    result = restem(*words)
    assert (result.code, result.err) == (0, "")
    for verb, text in VERBS.items():
        assert verb in result.out
        assert text in result.out


def test_version(restem):
    assert restem("--version").out == f"{__version__}\n"


def options_of(help_text):
    """Returns option -> its explanation, from what `--help` prints."""
    options, name = {}, None
    for line in help_text.splitlines():
        if line.startswith("  -"):
            head, _, text = line.strip().partition("  ")
            name, options[head] = head, text.strip()
        elif line.startswith("   ") and name is not None:
            options[name] += line.strip()
        else:
            name = None
    return options


@pytest.mark.parametrize("verb", VERBS)
def test_help_begins_with_a_command_in_one_line_and_what_it_does(verb, restem):
    usage, blank, description = restem(verb, "--help").out.splitlines()[:3]
    assert usage.startswith(f"usage: restem {verb} ")
    assert (blank, len(usage) <= 100, len(description.split()) > 4) == ("", True, True)


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_every_verb_is_explained(verb, restem, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    result = restem(verb, "--help")
    assert (result.code, result.err) == (0, "")
    options = options_of(result.out)
    assert len(options) >= 4
    for name, text in options.items():
        explanation = text.replace("(required", "").partition("(type:")[0].partition("(default:")[0]
        assert len(explanation.split()) >= 2, f"{name}: {text!r}"


def test_help_shows_no_python_object_and_that_of_replay_needs_no_address(restem):
    assert " at 0x" not in restem("fit", "--help").out
    shown = restem("sample", "--replay", "--help")
    assert (shown.code, "FOLDER:PROBLEM_ID:INDEX" in shown.out) == (0, True)


# --- verbs ---


def test_sample_draws_verifies_and_selects_and_draws_nothing_twice(
    restem, problems, tmp_path, python_file
):
    words = [
        *("sample", "--policy", EMBEDDED_POLICY, "--problems", problems),
        *("--output", tmp_path / "out", "--sampling.n", 3, "--selection.max_per_problem", 2),
        *("--verifier", source("callable", function=python_file("return True")), *SMALL),
    ]
    first = restem(*words)
    assert (first.code, first.err) == (0, "")
    store = CompletionStore(tmp_path / "out" / "completions")
    table = store.read()
    assert table.num_rows == 36
    funnel = read_json(tmp_path / "out" / "funnel.json")
    assert (funnel["completions"], funnel["correct"] <= 36) == (36, True)
    assert (tmp_path / "out" / "accepted.parquet").is_file()
    times = {part.path: part.path.stat().st_mtime_ns for part in store.parts()}
    assert restem(*words).code == 0
    assert {part.path: part.path.stat().st_mtime_ns for part in store.parts()} == times
    refused = restem(*words, "--sampling.top_k", 3)
    assert refused.code == 2
    assert "sampling.top_k was 40, now 3" in refused.err


def test_verify_writes_one_verdict_for_each_line(restem, tmp_path):
    lines = [
        {"problem_id": "a", "reference_answer": "4", "completion": "#### 4"},
        {"problem_id": "b", "reference_answer": "4", "completion": "#### 5", "case_id": 7},
        {"problem_id": "c", "reference_answer": "4", "completion": "no idea"},
        {"problem_id": "d"},
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = restem("verify", "--verifier", "math", "--input", path, "--output", tmp_path / "out")
    assert (result.code, result.err) == (0, "")
    rows = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [row["problem_id"] for row in rows] == ["a", "b", "c", "d"]
    assert [row["verdict"] for row in rows] == ["CORRECT", "WRONG", "NO_ANSWER", "ERROR"]
    assert [row["reward"] for row in rows] == [1.0, 0.0, 0.0, 0.0]
    assert rows[1]["case_id"] == 7
    assert json.loads(result.out) == {
        "CORRECT": 1,
        "WRONG": 1,
        "NO_ANSWER": 1,
        "ERROR": 1,
        "TIMEOUT": 0,
    }


def test_evaluate_prints_a_table_and_writes_json(restem, problems, tmp_path):
    result = restem(
        *("evaluate", "--policy", EMBEDDED_POLICY, "--problems", problems, *SMALL),
        *("--n", 3, "--k", "1,3", "--greedy", "--output", tmp_path / "out"),
    )
    assert (result.code, result.err) == (0, "")
    measured = read_json(tmp_path / "out" / "metrics.json")["evaluation"]["some"]
    assert set(measured) == {"greedy_pass@1", "pass@1", "pass@3", "maj@3"}
    for name, value in measured.items():
        assert 0 <= value["low"] <= value["value"] <= value["high"] <= 1
        assert f"{name:16}{100 * value['value']:7.1f} %" in result.out
    assert str(tmp_path / "out" / "metrics.json") in result.out


def test_evaluate_finds_a_folder_of_its_own(restem, problems, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "--policy", EMBEDDED_POLICY, "--problems", problems, "--n", 0, *SMALL]
    for changes in ([], ["--seed", 1], []):
        assert restem(*words, *changes).code == 0
    assert len(list((tmp_path / "runs" / "evaluate").glob("policy-some-*/metrics.json"))) == 2


def test_evaluate_without_greedy_measures_only_samples(restem, problems, tmp_path):
    words = ["--problems", problems, "--output", tmp_path, "--n", 2, "--no_greedy", *SMALL]
    assert restem("evaluate", *words).code == 0
    assert set(read_json(tmp_path / "metrics.json")["evaluation"]["some"]) == {"pass@1", "maj@2"}


def test_report_prints_metrics_as_json_or_writes_html(restem, tmp_path):
    folder = tmp_path / "run" / "iteration_0"
    folder.mkdir(parents=True)
    value = {"value": 0.5, "low": 0.25, "high": 0.75, "num_problems": 8}
    metrics = {"iteration": 0, "evaluation": {"held_out": {"pass@1": value}}, "e_step": {}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    printed = restem("report", "--json", tmp_path / "run")
    assert printed.code == 0
    run = json.loads(printed.out)[str(tmp_path / "run")]
    assert run["iterations"][0]["metrics"] == metrics
    written = restem("report", tmp_path / "run", "--output", tmp_path / "r.html")
    assert written.code == 0
    assert "held_out" in (tmp_path / "r.html").read_text()


# --- mistakes ---


def refusals():
    """(name, settings of fit, what the line must name)."""
    missing = source(JSONL, path="nowhere.jsonl")
    yield "missing problem file", {"problems.train": missing}, ["nowhere.jsonl"]
    yield "missing policy", {"policy": "/nowhere/policy"}, ["policy", "/nowhere/policy"]
    yield "no completions", {"sampling.n": 0}, ["sampling.n (0)", "at least 1"]
    yield "temperature", {"sampling.temperature": -1}, ["sampling.temperature (-1", "at least 0"]
    yield "quota", {"selection.max_per_problem": 9}, ["max_per_problem (9)", "sampling.n (4)"]
    yield "overlap", {"problems.held_out.held_out.init_args.split": "train"}, ["train", "held_out"]
    yield "unknown verifier", {"verifier": "maths"}, ["verifier (maths)", "math, procedural"]
    yield "function for a class", {"verifier": "os.path.join"}, ["os.path.join"]
    yield "verifier's argument", {"verifier": source("math", foo=1)}, ["foo", "init_args"]
    yield (
        "stop rule without D_val",
        {"problems.validation": "null"},
        ["problems.validation", "none"],
    )
    yield "unknown stop rule", {"stop.rule": "later"}, ["later", "first_drop"]
    yield "shots", {"prompt.init_args.shots": "nowhere.jsonl"}, ["shots", "nowhere.jsonl"]
    yield "no iteration", {"iterations": 0}, ["iterations (0)", "at least 1"]
    yield "start", {"start_from": "/nowhere"}, ["/nowhere"]
    yield "logger", {"trainer.logger": "true"}, ["trainer.logger"]
    yield "unknown key", {"sampling.m": 3}, ["sampling.m"]
    yield "type", {"sampling.n": "many"}, ["sampling.n", "many"]
    yield "class", {"problems.train": "no.Such"}, ["problems.train", "no.Such"]
    yield (
        "name of a set",
        {"problems.held_out": json.dumps({"train": json.loads(missing)})},
        ["rename"],
    )
    yield "no epoch", {"trainer.max_epochs": 0}, ["trainer.max_epochs (0)"]
    yield "no look", {"trainer.val_check_interval": 0}, ["trainer.val_check_interval (0)"]
    yield "other start", {"start_from": "previos"}, ["start_from (previos)"]
    yield "seed", {"seed_everything": 2**32}, ["seed_everything (4294967296)", "4294967295"]
    yield "accelerator", {"trainer.gradient_clip_val": 1.0}, ["trainer", "gradient_clip_val"]


@pytest.mark.parametrize(("changes", "named"), [pytest.param(c, n, id=i) for i, c, n in refusals()])
def test_a_mistake_in_the_settings_is_one_line(changes, named, restem, fit_words, tmp_path):
    result = restem(*fit_words(tmp_path / "run", **changes))
    check_line(result, named)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["fit", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["fit", "--policy", "embedded"], ["problems.train", "required"]),
        (["evaluate", "--problems", "x", "--k", "one"], ["k (one)"]),
        (["evaluate", "--problems", "x", "--n", "2", "--k", "4"], ["[4]", "n (2)"]),
        (["evaluate", "--problems", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["evaluate", "--problems", "x", "--n", "0", "--no_greedy"], ["n (0)", "--no_greedy"]),
        (["sample", "--problems", "x"], ["output", "required"]),
        (["verify", "--verifier", "math", "--input", "nowhere", "--output", "y"], ["nowhere"]),
        (["verify", "--verifier", "nope", "--input", "nowhere", "--output", "y"], ["nope"]),
        (["sample", "--problems", "x", "--output", "y", "--seed", 2**63], ["seed", f"{2**63}"]),
        (["verify", "--verifier", "math", "--input", "x", "--output", "./x"], ["output (./x)"]),
        (["compare", "--arms", '{"../a": {}}', "--control", "../a"], ["arms ('../a')"]),
        (["report", "/nowhere"], ["/nowhere"]),
        (["report", "/dev"], ["/dev", "run.json"]),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(words, named, restem):
    check_line(restem(*words), named, words[0])


def test_an_unknown_verb_is_answered_with_the_verbs(restem):
    check_line(restem("train"), VERBS, "train")


def test_a_policy_without_tokenizer_is_one_line(restem, fit_words, tmp_path):
    shutil.copytree(EMBEDDED_POLICY, tmp_path / "p", ignore=shutil.ignore_patterns("tokenizer*"))
    result = restem(*fit_words(tmp_path / "run", policy=tmp_path / "p"))
    check_line(result, [str(tmp_path / "p"), "tokenizer"])


def test_no_problem_is_one_line(restem, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    line = restem("evaluate", "--problems", tmp_path / "empty.jsonl")
    check_line(line, ["error: problems is empty"], "evaluate")


def test_problems_without_reference_answers_are_one_line(restem, fit_words, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"problem_id": "a", "question": "What?"}\n')
    unanswered = source(JSONL, path=str(tmp_path / "p.jsonl"), split=None, num=None)
    changes = {"problems.train": unanswered, "verifier": "math"}
    result = restem(*fit_words(tmp_path / "run", **changes))
    check_line(result, ["problems.train", "reference"])


def test_a_run_dir_that_cannot_be_written_is_one_line(restem, fit_words, tmp_path):
    (tmp_path / "file").write_text("")
    result = restem(*fit_words(tmp_path / "file" / "run"))
    check_line(result, ["run_dir", str(tmp_path / "file" / "run")])


def test_a_run_dir_that_another_process_works_in_is_one_line(restem, fit_words, tmp_path):
    with RunDir(tmp_path / "run").held():
        check_line(restem(*fit_words(tmp_path / "run")), ["run", "another process"])
    assert not (tmp_path / "run" / "run.json").exists()


def test_an_empty_accepted_dataset_is_one_line_and_stays_one(
    restem, fit_words, tmp_path, python_file
):
    verifier = source("callable", function=python_file("return text == problem.reference_solution"))
    changes = {"verifier": verifier, "sampling.max_new_tokens": 1}
    for _ in range(2):
        result = restem(*fit_words(tmp_path / "run", **changes))
        check_line(result, ["accepted dataset is empty", "truncated", "sampling.max_new_tokens"])


def test_a_verifier_that_fails_on_every_reference_is_one_line(
    restem, fit_words, tmp_path, python_file
):
    verifier = source("callable", function=python_file("raise RuntimeError('out of order')"))
    result = restem(*fit_words(tmp_path / "run", verifier=verifier))
    check_line(result, ["problems.train", "ERROR", "out of order"])


def test_a_verifier_that_fails_on_completions_stops_the_run(
    restem, fit_words, tmp_path, python_file
):
    body = "return text == problem.reference_solution or 1 / 0"
    verifier = source("callable", function=python_file(body))
    changes = {"verifier": verifier, "problems.train.init_args.num": 80, "evaluation.n": 0}
    result = restem(*fit_words(tmp_path / "run", **changes))
    check_line(result, ["verifier is broken", "ZeroDivisionError", "max_error_rate"])


def test_a_device_that_does_not_exist_is_one_line(restem, problems):
    result = restem("evaluate", "--problems", problems, "--engine.device", "foo")
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "engine.device (foo) must be auto, cpu, cuda" in result.err


def test_more_memory_than_there_is_is_one_line(restem, problems, tmp_path):
    words = ["--problems", problems, "--output", tmp_path / "out", *SMALL]
    line = restem("sample", *words, "--engine.cache_tokens", 10**12)
    check_line(line, ["out of memory", "engine.cache_tokens"], "sample")


def test_a_file_where_a_folder_must_be_is_one_line(restem, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "in").write_text("")
    words = ["--input", tmp_path / "in", "--output", tmp_path / "file" / "out"]
    check_line(restem("verify", "--verifier", "math", *words), [str(tmp_path / "file")], "verify")


def test_an_output_that_cannot_be_written_is_one_line(restem, problems, tmp_path):
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "below"
    result = restem("sample", "--problems", problems, "--output", output, *SMALL)
    assert result.code == 2
    assert result.err.strip().count("\n") == 0
    assert str(output) in result.err
    assert "write elsewhere" in result.err
