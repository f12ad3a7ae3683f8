"""Words and config files that no verb can read: the line says where, and what was likely meant."""

import json

import pytest

from tests.conftest import check_line

JSONL = "restem_lightning.problems.JsonlProblems"
MISNAMED = json.dumps({"class_path": JSONL, "init_args": {"pth": "x"}})


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["fit", "--smapling.n", "4"], "did you mean sampling.n?"),
        (["verify", "--wrokers", "4"], "did you mean workers?"),
        (["report", "--qqqqqqqqq", "4"], "--qqqqqqqqq; `restem report --help`"),
        (["fit", "--trainer.max_epoch", "2"], "did you mean trainer.max_epochs?"),
        (["fit", "--seed", "2"], "did you mean seed_everything?"),
        (["fit", "--n", "2"], "did you mean sampling.n?"),
        (["plan", "--temperature", "2"], "did you mean sampling.temperature?"),
        (["sample", "--problem", "x", "--output", "y"], "did you mean problems?"),
        (["compare", "--arm", "{}", "--control", "a"], "did you mean arms?"),
        (["evaluate", "--problems", "x", "--sampling.n", "2"], "did you mean n?"),
        (["evaluate", "x.jsonl"], "x.jsonl; a value follows its option; `restem evaluate --help`"),
        (["fit"], "problems.train; give it, or a --config that has it"),
        (["fit", "quick.yaml"], "did you mean --config quick.yaml?"),
        (["fit", "--prompt", "ChatPrompt"], "did you mean restem_lightning.prompts.ChatPrompt?"),
        (["fit", "--problems.train", "APPS"], "did you mean restem_lightning.problems.APPS?"),
        (["fit", "--problems.train", MISNAMED], f"--problems.train.help {JSONL}` lists"),
        (["fit", "--verifier.init_args.answer_format", "boxed"], "verifier is given as a whole"),
    ],
)
def test_an_unknown_word_is_answered_with_the_likely_one(words, named, restem):
    check_line(restem(*words), [named], words[0])


@pytest.mark.parametrize("text", ["trainer: {max_epohcs: 2}", "{trainer.max_epohcs: 2}"])
def test_a_misspelled_key_is_answered_with_the_likely_one(text, restem, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    result = restem("fit", "--config", tmp_path / "bad.yaml")
    check_line(result, ["max_epohcs", "did you mean trainer.max_epochs?"])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("sampling: [1", ["bad.yaml line 1"]),
        ("sampling:\n\tn: 4\n", ["bad.yaml line 2", "spaces"]),
        ("sampling: {m: 3}", ["sampling"]),
        ("unknown: 1", ["unknown"]),
        ("- a\n- b\n", ["bad.yaml", "iterations: 3"]),
        ("# iterations: 3\n", ["bad.yaml", "iterations: 3"]),
        ("\udcff", ["bad.yaml", "UTF-8"]),
        ("sampling: {n: 4}\nsampling: {top_k: 5}\n", ["bad.yaml line 2: sampling is there twice"]),
        ("a:\n- b: 1\n  c: 2\n  b: 3\n", ["bad.yaml line 4: b is there twice"]),
    ],
)
@pytest.mark.parametrize("verb", ["fit", "verify"])
def test_a_bad_config_is_one_line(verb, text, named, restem, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text, errors="surrogateescape")
    check_line(restem(verb, f"--config={path}"), named, verb)
    check_line(restem(verb, "--config", path), named, verb)
