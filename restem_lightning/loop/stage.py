"""A sampling stage: problems in, completions with verdicts out, sampler beside verifiers."""

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from restem_lightning.completions import Completion, Verdict
from restem_lightning.loop.quota import next_indices
from restem_lightning.m_step.export import policy_hash
from restem_lightning.problems import Problem
from restem_lightning.prompts import PromptTemplate, encode_prompt
from restem_lightning.sampler import EngineParams, Request, Sample, Sampler, SamplingParams
from restem_lightning.scoring import ScoringParams
from restem_lightning.selection import SelectionParams
from restem_lightning.verifiers import VerifierPool
from restem_lightning.verifiers.composed import ITERATION

POLL_EVERY_S = 0.02


@dataclass(kw_only=True)
class Policy:
    """A policy ready to sample.

    Args:
        sampler: holds its weights.
        tokenizer: its Hugging Face tokenizer.
        hash: of its folder.
        engine: JSON of how the sampler uses the machine, see `Completion.engine`.
    """

    sampler: Sampler
    tokenizer: Any
    hash: str
    engine: str

    def decode(self, token_ids: list[int]) -> str:
        """Returns the text of tokens as it is, without what some tokenizers tidy up in it."""
        return self.tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def text_of(self, sample: Sample) -> str:
        """Returns the text of a completion, up to the stop string that ended it."""
        text = self.decode(list(sample.token_ids))
        return text[: len(text) - sample.num_beyond]


def load_policy(folder: str, engine: EngineParams) -> Policy:
    """Returns a policy folder ready to sample."""
    return Policy(
        sampler=Sampler(folder, engine),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        hash=policy_hash(folder),
        engine=json.dumps(engine_record(engine), sort_keys=True),
    )


def eos_ids(folder: str, template: PromptTemplate) -> tuple[int, ...]:
    """Returns the token ids that end a completion of a policy folder, the one to write first.

    Chat models have several, and generation_config.json may name the end of a text first: Llama 3
    Instruct's does. In a conversation an answer ends as the chat template ends a turn.
    """
    try:
        eos = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:  # there is no generation_config.json
        eos = AutoConfig.from_pretrained(folder).eos_token_id
    ids = [eos] if isinstance(eos, int) else eos or []
    tokenizer = AutoTokenizer.from_pretrained(folder) if _ends_turns(template) else None
    return written_first(ids, template, tokenizer)


def written_first(ids: Sequence[int], template: PromptTemplate, tokenizer: Any) -> tuple[int, ...]:
    """Returns EOS ids, the one that the chat template ends a turn with before the others.

    Args:
        ids: as the policy has them.
        template: one without `end_of_turn` leaves their order as it is.
        tokenizer: the policy's.
    """
    if not _ends_turns(template):
        return tuple(ids)
    end = tokenizer.encode(template.end_of_turn(tokenizer), add_special_tokens=False)
    last = next((one for one in end if one in ids), None)
    return tuple(sorted(ids, key=lambda one: one != last))


def _ends_turns(template: PromptTemplate) -> bool:
    return hasattr(template, "end_of_turn")


def engine_record(engine: EngineParams) -> dict[str, Any]:
    """Returns engine settings with what `auto` means here; EngineParams takes them again."""
    return asdict(engine) | {
        "device": engine.resolve_device().type,
        "dtype": str(engine.resolve_dtype()).removeprefix("torch."),
        "batch_invariant": "on" if engine.resolve_batch_invariant() else "off",
    }


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What draws and judges completions, and the part of their addresses that they share.

    Args:
        policy: what samples.
        template: makes the prompts.
        verifiers: a drained pool.
        params: how to sample.
        seed: part of the address of every draw.
        iteration: part of the address of every draw.
        purpose: part of the address, before the problem_id; tells the draws of an evaluation from
            those of the E-step.
        scoring: a learned verifier, for the E-step alone; None for none.
        first_index: completion_index of each problem's first completion; pools that are united
            share none.
        should_stop: asked between completions.
        is_leaving: asked where ranks wait for each other, see `any_rank`.
    """

    policy: Policy
    template: PromptTemplate
    verifiers: VerifierPool
    params: SamplingParams
    seed: int
    iteration: int
    purpose: str = ""
    scoring: ScoringParams | None = None
    first_index: int = 0
    should_stop: Callable[[], bool] = bool  # never
    is_leaving: Callable[[], bool] = bool

    @property
    def is_e_step(self) -> bool:
        """Whether completions are drawn to train on, and not to measure a policy."""
        return not self.purpose.startswith(("evaluation/", "validation/"))

    @property
    def verifier(self) -> str:
        """Name and version of the verifier."""
        return f"{self.verifiers.verifier.name}/{self.verifiers.verifier.version}"


class Judged(NamedTuple):
    """A completion with its verdict, and where its problem stands.

    Attributes:
        completion: the completion.
        is_last: whether no other completion of its problem is to come.
        num_skipped: with the last one, how many the quota has spared.
    """

    completion: Completion
    is_last: bool
    num_skipped: int


def verified_completions(
    problems: Iterable[Problem], stage: Stage, *, quota: SelectionParams | None = None
) -> Iterator[Judged]:
    """Yields completions with their verdicts, sampling and verifying side by side.

    Args:
        problems: taken as late as possible; `stage.params.n` completions of each are drawn.
        stage: how.
        quota: settings of a selection; what it could not accept is not drawn. None draws all.
    """
    under_way = _UnderWay(problems, stage, quota)
    is_done = False
    while not is_done:
        polled = 0.0
        for sample in stage.policy.sampler.generate(
            under_way.requests(),
            stage.params,
            seed=stage.seed,
            iteration=stage.iteration,
            decode=stage.policy.decode,
        ):
            under_way.submit(sample)
            if time.monotonic() - polled > POLL_EVERY_S:
                polled = time.monotonic()
                yield from under_way.judged(stage.verifiers.poll())
        yield from under_way.judged(stage.verifiers.drain())
        is_done = not under_way.waiting  # the last verdicts may ask for more


@dataclass(kw_only=True)
class _Drawing:
    """A problem whose completions are being drawn and judged.

    Args:
        problem: the problem.
        prompt_ids: of its prompt.
        num_shared: how many of them are of the preamble.
        next_indices: completions that the sampler gets or has got.
        unjudged: index -> completion, for those without a verdict.
        judged: those with one.
    """

    problem: Problem
    prompt_ids: list[int]
    num_shared: int
    next_indices: tuple[int, ...]
    unjudged: dict[int, Completion] = field(default_factory=dict)
    judged: list[Completion] = field(default_factory=list)


class _UnderWay:
    """The problems between being taken up and the last verdict."""

    def __init__(self, problems: Iterable[Problem], stage: Stage, quota: SelectionParams | None):
        self.problems, self.stage, self.quota = iter(problems), stage, quota
        self.drawings: dict[str, _Drawing] = {}
        self.waiting: deque[_Drawing] = deque()  # to be drawn from again
        self.sampling = json.dumps(asdict(stage.params), sort_keys=True)

    def requests(self) -> Iterator[Request]:
        """Yields what to draw next: of problems under way first, then of new ones."""
        while drawing := self.waiting.popleft() if self.waiting else self._take_up():
            yield Request(
                request_id=self.stage.purpose + drawing.problem.problem_id,
                prompt_ids=tuple(drawing.prompt_ids),
                num_shared=drawing.num_shared,
                indices=tuple(self.stage.first_index + i for i in drawing.next_indices),
            )

    def _take_up(self) -> _Drawing | None:
        """Returns the next new problem."""
        problem, stage = next(self.problems, None), self.stage
        if problem is None:
            return None
        prompt_ids, num_shared = encode_prompt(stage.template, problem, stage.policy.tokenizer)
        if stage.is_e_step:
            problem = replace(problem, metadata={**problem.metadata, ITERATION: stage.iteration})
        self.drawings[problem.problem_id] = _Drawing(
            problem=problem,
            prompt_ids=prompt_ids,
            num_shared=num_shared,
            next_indices=next_indices([], stage.params.n, self.quota),
        )
        return self.drawings[problem.problem_id]

    def submit(self, sample: Sample) -> None:
        """Hands a drawn completion to the verifiers."""
        stage = self.stage
        drawing = self.drawings[sample.request_id.removeprefix(stage.purpose)]
        problem_id = drawing.problem.problem_id
        text = stage.policy.text_of(sample)
        drawing.unjudged[sample.index] = Completion(
            iteration=stage.iteration,
            problem_id=problem_id,
            completion_index=sample.index,
            seed=stage.seed,
            purpose=stage.purpose,
            prompt_ids=drawing.prompt_ids,
            num_shared=drawing.num_shared,
            completion_ids=list(sample.token_ids),
            text=text,
            logprobs=list(sample.logprobs),
            sampling_logprobs=list(sample.sampling_logprobs),
            finish_reason=sample.finish_reason,
            policy_hash=stage.policy.hash,
            sampling=self.sampling,
            engine=stage.policy.engine,
            verifier=stage.verifier,
        )
        stage.verifiers.submit((problem_id, sample.index), drawing.problem, text)

    def judged(self, verdicts: Iterable[tuple[Any, Verdict]]) -> Iterator[Judged]:
        """Yields completions whose verdicts have come, and decides whether to draw more."""
        n = self.stage.params.n
        for (problem_id, index), verdict in verdicts:
            drawing, is_last = self.drawings[problem_id], False
            completion = drawing.unjudged.pop(index).with_verdict(verdict)
            drawing.judged.append(completion)
            if len(drawing.judged) > drawing.next_indices[-1]:  # all asked for so far are there
                drawing.next_indices = next_indices(drawing.judged, n, self.quota)
                is_last = not drawing.next_indices
                if is_last:
                    del self.drawings[problem_id]
                else:
                    self.waiting.append(drawing)
            yield Judged(completion, is_last, n - len(drawing.judged) if is_last else 0)
