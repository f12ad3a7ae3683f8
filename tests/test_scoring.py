"""Learned verifiers: their scores, and one verdict of theirs and the verifier's."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers import LlamaForSequenceClassification as Classifier

from restem_lightning.completions import VerdictKind
from restem_lightning.errors import UserError
from restem_lightning.problems import Problem
from restem_lightning.scoring import ClassifierScorer, LikelihoodScorer, ScoringParams
from restem_lightning.settings import EMBEDDED_POLICY
from tests.factories import make_completion

CORRECT, WRONG, NO_ANSWER, TIMEOUT, ERROR = VerdictKind
PROBLEM = Problem(problem_id="p", question="Two and two?")
POLICY = str(EMBEDDED_POLICY)


def completion(text, *, kind=CORRECT, finish="eos"):
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    ids = tokenizer.encode(text, add_special_tokens=False)
    ids += [tokenizer.eos_token_id] if finish == "eos" else []
    return make_completion(
        prompt_ids=tokenizer.encode("Q: Two and two?\nA:\n"),
        completion_ids=ids,
        text=text,
        finish_reason=finish,
        kind=kind,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A policy folder with other weights than the embedded one."""
    folder = tmp_path_factory.mktemp("trained") / "policy"
    shutil.copytree(POLICY, folder)
    model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def loglikelihood(folder, one):
    """By Hugging Face's own forward."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    both = torch.tensor([one.prompt_ids + one.completion_ids])
    logprobs = model(input_ids=both).logits[0].log_softmax(-1)
    place = len(one.prompt_ids) - 1
    return sum(logprobs[place + i, t].item() for i, t in enumerate(one.completion_ids))


def test_the_likelihood_of_what_was_drawn_is_the_score(trained):
    some = [completion("4\n#### 4"), completion("so it must be 2 + 2 = 5\n#### 5")]
    scores = LikelihoodScorer(trained).score([(PROBLEM, one) for one in some])
    assert scores == pytest.approx([loglikelihood(trained, one) for one in some], abs=1e-3)


def test_with_a_reference_the_score_is_the_implicit_reward(trained):
    one = completion("4\n#### 4")
    (score,) = LikelihoodScorer(trained, reference=POLICY, beta=0.5).score([(PROBLEM, one)])
    ratio = loglikelihood(trained, one) - loglikelihood(POLICY, one)
    assert score == pytest.approx(0.5 * ratio, abs=1e-3)
    assert abs(ratio) > 0.1


def test_what_a_stop_string_ended_is_scored_with_the_eos_that_training_adds(trained):
    stopped, ended = completion("4", finish="stop"), completion("4")
    scorer = LikelihoodScorer(trained)
    assert scorer.score([(PROBLEM, stopped)]) == scorer.score([(PROBLEM, ended)])


def test_the_version_follows_the_weights(trained):
    assert LikelihoodScorer(trained).version != LikelihoodScorer(POLICY).version


@pytest.mark.parametrize("pads", ["as the tokenizer", "otherwise", "never"])
@pytest.mark.parametrize("num_labels", [1, 2])
def test_a_classifier_gives_the_probability_of_its_label(num_labels, pads, tmp_path):
    torch.manual_seed(num_labels)
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    tokenizer.pad_token = None if pads == "never" else tokenizer.eos_token
    padding = {"never": None, "otherwise": tokenizer.encode("a")[0]}
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_labels=num_labels,
        pad_token_id=padding.get(pads, tokenizer.eos_token_id),
    )  # fmt: skip
    model = Classifier(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    some = [completion("4"), completion("it is five and a half")]
    scores = ClassifierScorer(str(tmp_path), batch_size=2).score([(PROBLEM, one) for one in some])
    for one, score in zip(some, scores, strict=True):
        text = f"{PROBLEM.question}\n{one.text}"
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        expected = logits.sigmoid()[0] if num_labels == 1 else logits.softmax(-1)[1]
        assert score == pytest.approx(expected.item(), abs=1e-5)


class Length:
    """Scores a completion by a tenth of its length."""

    name, version = "length", "1"

    def score(self, judged):
        return [len(one.text) / 10 for _, one in judged]

    def close(self):
        pass


@pytest.mark.parametrize(
    ("rule", "text", "kind", "expected", "reward"),
    [
        ("all", "long enough", CORRECT, CORRECT, 1.0), ("all", "short", CORRECT, WRONG, 0.0),
        ("all", "long enough", NO_ANSWER, NO_ANSWER, 0.0),
        ("any", "long enough", WRONG, CORRECT, 1.0), ("any", "short", WRONG, WRONG, 0.0),
        ("weighted", "long enough", WRONG, WRONG, 0.275),
        ("weighted", "short", CORRECT, CORRECT, 0.875),
        ("weighted", "long enough", TIMEOUT, TIMEOUT, 0.0),
        ("sum", "long enough", WRONG, WRONG, 1.1), ("sum", "short", CORRECT, CORRECT, 1.5),
    ],
)  # fmt: skip
def test_two_verdicts_become_one_and_both_are_kept(rule, text, kind, expected, reward):
    params = ScoringParams(scorer=Length(), rule=rule, threshold=0.6, weight=0.25)
    (judged,) = params.apply([(PROBLEM, completion(text, kind=kind))])
    assert judged.verdict.kind is expected
    assert judged.verdict.reward == pytest.approx(reward)
    parts = json.loads(judged.verdict.detail)
    assert parts["verifier"][0] == kind.value
    assert parts["learned"][1] == pytest.approx(len(text) / 10)


def test_without_a_scorer_nothing_changes():
    one = completion("4")
    assert ScoringParams().apply([(PROBLEM, one)]) == [one]
    assert ScoringParams().key() is None


@pytest.mark.parametrize("change", [{"rule": "by_iteration"}, {"weight": 1.5}])
def test_a_value_that_is_not_allowed_is_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        ScoringParams(**change)


def test_a_language_model_is_no_classifier():
    with pytest.raises(UserError, match=r"lacks score\.weight"):
        ClassifierScorer(POLICY).score([(PROBLEM, completion("4"))])
