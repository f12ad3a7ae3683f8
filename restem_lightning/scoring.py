"""Learned verifiers: models that give a completion a real-valued score.

They run in the sampling process and in batches, after the verifier: the processes of verifiers stay
light, killable and without torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from restem_lightning.completions import Completion, Verdict, VerdictKind
from restem_lightning.errors import UserError
from restem_lightning.m_step.export import check_policy_folder, policy_hash
from restem_lightning.m_step.likelihood import all_logprobs
from restem_lightning.m_step.packing import TrainingSequence
from restem_lightning.m_step.weights import load_policy
from restem_lightning.pretrained import load_whole
from restem_lightning.problems import Problem
from restem_lightning.verifiers.composed import compose

Rule = Literal["all", "any", "weighted", "sum"]


class Scorer(Protocol):
    """Gives completions a score; named by class path in YAML, with the types below.

    It also has two texts, `name` and `version`, that are part of a pool's key: the version changes
    when scores may change.
    """

    def score(self, judged: Sequence[tuple[Problem, Completion]]) -> list[float]:
        """Returns one finite score for each completion; the higher the better."""

    def close(self) -> None:
        """Frees what `score` has loaded; `score` loads it again."""


class LikelihoodScorer:
    """A causal language model whose log-likelihood of a completion is its score (V-STaR)."""

    name = "likelihood"

    def __init__(
        self,
        policy: str,
        reference: str | None = None,
        beta: float = 1.0,
        tokens_per_batch: int = 8192,
        device: str = "auto",
    ) -> None:
        """Scores token ids, so the models must have the tokenizer of the policy that samples.

        Args:
            policy: folder in Hugging Face layout.
            reference: folder of the model that `policy` was trained from by DPO: the score is then
                DPO's implicit reward, beta times the log-likelihood ratio. null: the log-likelihood
                itself (arXiv 2402.06457, section 3.1).
            beta: with reference, DPO's beta.
            tokens_per_batch: most tokens that are scored at once.
            device: auto (a GPU if there is one), cpu, cuda, ...
        """
        self.policy, self.reference, self.beta = policy, reference, beta
        self.tokens_per_batch, self.device = tokens_per_batch, _device(device)
        self._models: list[PreTrainedModel] = []

    @property
    def version(self) -> str:
        """Hashes of the models."""
        folders = [self.policy, *([self.reference] if self.reference else [])]
        return "/".join(policy_hash(folder)[:12] for folder in folders) + f"*{self.beta:g}"

    def score(self, judged: Sequence[tuple[Problem, Completion]]) -> list[float]:
        """Returns log V(completion | prompt), or beta (log V - log reference)."""
        if not self._models:
            folders = [self.policy, *([self.reference] if self.reference else [])]
            for folder in folders:
                check_policy_folder(folder)
                self._models.append(load_policy(folder).eval().to(self.device))
        sequences = [_sequence(completion, self._models[0]) for _, completion in judged]
        scores = [
            all_logprobs(model, sequences, self.device, tokens_per_batch=self.tokens_per_batch)
            for model in self._models
        ]
        result = self.beta * (scores[0] - scores[1]) if self.reference else scores[0]
        return result.tolist()

    def close(self) -> None:
        """Frees the models."""
        self._models = []


class ClassifierScorer:
    """A model with a sequence classification head; the probability of a class is the score."""

    name = "classifier"

    def __init__(
        self,
        policy: str,
        text_format: str = "{question}\n{completion}",
        label: int = 1,
        batch_size: int = 32,
        device: str = "auto",
    ) -> None:
        """Scores texts, with the classifier's own tokenizer.

        Args:
            policy: folder in Hugging Face layout (AutoModelForSequenceClassification).
            text_format: what the classifier reads; holds {question} and {completion}.
            label: the class that means correct; of a model with one output that is its sigmoid.
            batch_size: completions that are scored at once.
            device: auto (a GPU if there is one), cpu, cuda, ...

        Raises:
            UserError: the format lacks a placeholder.
        """
        for part in ("{question}", "{completion}"):
            if part not in text_format:
                raise UserError(f"text_format ({text_format!r}) must hold {part}; add it")
        self.policy, self.text_format, self.label = policy, text_format, label
        self.batch_size, self.device = batch_size, _device(device)
        self._model: PreTrainedModel | None = None

    @property
    def version(self) -> str:
        """Hash of the model and what it reads."""
        return f"{policy_hash(self.policy)[:12]}/{self.label}/{self.text_format!r}"

    @torch.no_grad()
    def score(self, judged: Sequence[tuple[Problem, Completion]]) -> list[float]:
        """Returns the probability of `label`, 0 to 1.

        Raises:
            UserError: the folder lacks weights, as a language model's does those of a classifier.
        """
        if self._model is None:
            model = load_whole(AutoModelForSequenceClassification, self.policy, dtype=torch.float32)
            self._tokenizer = AutoTokenizer.from_pretrained(self.policy)
            if self._tokenizer.pad_token is None:
                self._tokenizer.pad_token = self._tokenizer.eos_token
            # A decoder's score is that of the last token of another id.
            model.config.pad_token_id = self._tokenizer.pad_token_id
            self._model = model.eval().to(self.device)
        texts = [
            self.text_format.replace("{question}", problem.question).replace(
                "{completion}", completion.text
            )
            for problem, completion in judged
        ]
        scores: list[float] = []
        for first in range(0, len(texts), self.batch_size):
            batch = self._tokenizer(
                texts[first : first + self.batch_size],
                padding=True,
                truncation=True,
                return_tensors="pt",
            )
            logits = self._model(**batch.to(self.device)).logits.float()
            one_output = logits.shape[1] == 1
            chances = logits.sigmoid()[:, 0] if one_output else logits.softmax(-1)[:, self.label]
            scores += chances.tolist()
        return scores

    def close(self) -> None:
        """Frees the model."""
        self._model = None


@dataclass(frozen=True, kw_only=True)
class ScoringParams:
    """A learned verifier beside the verifier, in the E-step; D_val and evaluation go without it.

    Args:
        scorer: class path of the scorer; null for none.
        threshold: the learned verifier says CORRECT of a score above it; with weighted, CORRECT is
            a weighted reward above it.
        rule: how the two verdicts become one: all, any, weighted, or sum: the verifier's verdict,
            with the sum of both rewards (arXiv 2412.17256, equation 2).
        weight: with weighted, the score's share of the reward, 0 to 1; 1 is the scorer alone.
    """

    scorer: Scorer | None = None
    threshold: float = 0.5
    rule: str = "all"
    weight: float = 0.5

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is not allowed.
        """
        if self.rule not in get_args(Rule):
            names = ", ".join(get_args(Rule))
            raise UserError(f"scoring.rule ({self.rule}) must be one of {names}; choose one")
        if not 0 <= self.weight <= 1:
            raise UserError(f"scoring.weight ({self.weight}) must lie from 0 to 1")

    def key(self) -> dict[str, Any] | None:
        """Returns what a pool's key holds of it, None without a scorer."""
        if self.scorer is None:
            return None
        how = {name: value for name, value in vars(self).items() if name != "scorer"}
        return how | {"scorer": f"{self.scorer.name}/{self.scorer.version}"}

    def apply(self, judged: Sequence[tuple[Problem, Completion]]) -> list[Completion]:
        """Returns completions with the verdict of both; each one's own stands in `detail`."""
        if self.scorer is None or not judged:
            return [completion for _, completion in judged]
        scores = self.scorer.score(judged)
        return [
            completion.with_verdict(self._verdict(completion.verdict, score))
            for (_, completion), score in zip(judged, scores, strict=True)
        ]

    def _verdict(self, verdict: Verdict, score: float) -> Verdict:
        kind = VerdictKind.CORRECT if score > self.threshold else VerdictKind.WRONG
        both = compose(
            {"verifier": verdict, "learned": Verdict(kind=kind, reward=score)},
            "all" if self.rule == "sum" else self.rule,
            weights={"verifier": 1 - self.weight, "learned": self.weight},
            threshold=self.threshold,
        )
        if self.rule == "sum":
            return replace(both, kind=verdict.kind, reward=verdict.reward + score)
        return both


def _sequence(completion: Completion, model: PreTrainedModel) -> TrainingSequence:
    """Returns the token ids to score; EOS after what a stop string ended, as in training."""
    ids, eos = list(completion.completion_ids), model.generation_config.eos_token_id
    ends = eos if isinstance(eos, list) else [eos]
    if completion.finish_reason == "stop" and ends[0] is not None and ids[-1:] != ends[:1]:
        ids.append(ends[0])
    both = np.array([*completion.prompt_ids, *ids], dtype=np.int32)
    return TrainingSequence(both, len(completion.prompt_ids), 1.0)


def _device(name: str) -> torch.device:
    return torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    )
