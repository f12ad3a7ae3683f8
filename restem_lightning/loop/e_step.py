"""The E-step: problems -> sampled, verified completions -> parquet parts; resumable anywhere."""

import hashlib
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoTokenizer

from restem_lightning.completions import Completion, CompletionStore, VerdictKind
from restem_lightning.errors import UserError
from restem_lightning.loop.ranks import is_distributed, is_rank_zero
from restem_lightning.m_step.export import policy_hash
from restem_lightning.problems import Problem
from restem_lightning.prompts import PromptTemplate, encode_prompt, template_hash
from restem_lightning.sampler import EngineParams, Request, Sample, Sampler, SamplingParams
from restem_lightning.verifiers import VerifierPool, check_references

MIN_VERDICTS_FOR_ALARM = 200
POLL_EVERY_S = 0.02
LINE_EVERY_S = 60.0
LINE_FORMAT = "{desc}: {n_fmt} of {total_fmt} completions, {remaining} left{postfix}"


@dataclass(frozen=True, kw_only=True)
class EStepParams:
    """How the E-step is cut into pieces and guarded; none of this changes what is drawn.

    Args:
        problems_per_part: problems in a parquet part, the piece of work that a rank claims and that
            a kill can cost.
        max_error_rate: the run stops when more than this share of the verdicts is ERROR (after 200
            of them): a broken verifier must not look like a weak policy.
    """

    problems_per_part: int = 32
    max_error_rate: float = 0.2

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is not allowed.
        """
        if self.problems_per_part < 1:
            raise UserError(
                f"e_step.problems_per_part ({self.problems_per_part}) must be at least 1"
            )
        if not 0 <= self.max_error_rate <= 1:
            raise UserError(f"e_step.max_error_rate ({self.max_error_rate}) must be from 0 to 1")


@dataclass(kw_only=True)
class Policy:
    """A policy ready to sample: the sampler, its tokenizer, and the hash of its weights."""

    sampler: Sampler
    tokenizer: Any
    hash: str


def load_policy(folder: str, engine: EngineParams) -> Policy:
    """Returns a policy folder ready to sample."""
    return Policy(
        sampler=Sampler(folder, engine),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        hash=policy_hash(folder),
    )


@dataclass(kw_only=True)
class Progress:
    """What has come out of a sampling stage so far, on this rank."""

    num_completions: int = 0
    num_correct: int = 0
    num_tokens: int = 0
    verdicts: Counter = field(default_factory=Counter)

    def add(self, completion: Completion) -> None:
        """Counts one more completion."""
        self.num_completions += 1
        self.num_correct += completion.verdict.kind is VerdictKind.CORRECT
        self.num_tokens += len(completion.completion_ids)
        self.verdicts[completion.verdict.kind.value] += 1

    def summary(self, seconds: float) -> str:
        """Returns the rates so far in a few words."""
        return (
            f"{self.num_tokens / seconds:.0f} tokens/s, "
            f"correct {100 * self.num_correct / self.num_completions:.1f} %"
        )

    def check(self, max_error_rate: float, last: Completion) -> None:
        """Stops a run whose verifier is broken.

        Raises:
            UserError: too many verdicts are ERROR.
        """
        errors = self.verdicts[VerdictKind.ERROR.value]
        if (
            self.num_completions >= MIN_VERDICTS_FOR_ALARM
            and errors > max_error_rate * self.num_completions
        ):
            raise UserError(
                f"the verifier is broken: {errors} of {self.num_completions} verdicts are ERROR "
                f"(more than e_step.max_error_rate {max_error_rate}); the last one says: "
                f"{last.verdict.detail}"
            )


def pool_key(
    *,
    policy: Policy,
    template: PromptTemplate,
    verifiers: VerifierPool,
    params: SamplingParams,
    problems: list[Problem],
    problems_per_part: int,
    seed: int,
    iteration: int,
) -> dict[str, Any]:
    """Returns all that determines a pool of completions."""
    content = json.dumps([vars(problem) for problem in problems], sort_keys=True)
    return {
        "seed": seed,
        "iteration": iteration,
        "policy_hash": policy.hash,
        "sampling": asdict(params),
        "prompt_hash": template_hash(template, policy.tokenizer),
        "verifier": f"{verifiers.verifier.name}/{verifiers.verifier.version}",
        "dtype": str(policy.sampler.dtype),
        "num_problems": len(problems),
        "problems_hash": hashlib.sha256(content.encode()).hexdigest(),
        "problems_per_part": problems_per_part,
    }


def verified_completions(
    work: Iterator[tuple[Problem, tuple[int, ...]]],
    *,
    policy: Policy,
    template: PromptTemplate,
    verifiers: VerifierPool,
    params: SamplingParams,
    seed: int,
    iteration: int,
    purpose: str = "",
) -> Iterator[Completion]:
    """Yields completions with their verdicts, sampling and verifying side by side.

    Args:
        work: (problem, indices of its completions), taken as late as possible.
        policy: what samples.
        template: makes the prompts.
        verifiers: a drained pool.
        params: how to sample.
        seed: part of the address of every draw.
        iteration: part of the address of every draw.
        purpose: part of the address; tells the draws of an evaluation from those of the E-step.
    """
    problems: dict[str, tuple[Problem, list[int]]] = {}
    waiting: dict[tuple[str, int], Completion] = {}
    sampling = json.dumps(asdict(params), sort_keys=True)
    verifier = f"{verifiers.verifier.name}/{verifiers.verifier.version}"

    def requests() -> Iterator[Request]:
        for problem, indices in work:
            prompt_ids, num_shared = encode_prompt(template, problem, policy.tokenizer)
            problems[problem.problem_id] = (problem, prompt_ids)
            yield Request(
                request_id=purpose + problem.problem_id,
                prompt_ids=tuple(prompt_ids),
                num_shared=num_shared,
                indices=indices,
            )

    def decode(token_ids: list[int]) -> str:
        return policy.tokenizer.decode(token_ids, skip_special_tokens=True)

    def submit(sample: Sample) -> None:
        problem, prompt_ids = problems[sample.request_id.removeprefix(purpose)]
        key = (problem.problem_id, sample.index)
        text = decode(list(sample.token_ids))
        waiting[key] = Completion(
            iteration=iteration,
            problem_id=problem.problem_id,
            completion_index=sample.index,
            seed=seed,
            prompt_ids=prompt_ids,
            completion_ids=list(sample.token_ids),
            text=text,
            logprobs=list(sample.logprobs),
            sampling_logprobs=list(sample.sampling_logprobs),
            finish_reason=sample.finish_reason,
            policy_hash=policy.hash,
            sampling=sampling,
            verifier=verifier,
        )
        verifiers.submit(key, problem, text)

    def judged(verdicts) -> Iterator[Completion]:
        for key, verdict in verdicts:
            yield waiting.pop(key).with_verdict(verdict)

    polled = 0.0
    for sample in policy.sampler.generate(
        requests(), params, seed=seed, iteration=iteration, decode=decode
    ):
        submit(sample)
        if time.monotonic() - polled > POLL_EVERY_S:
            polled = time.monotonic()
            yield from judged(verifiers.poll())
    yield from judged(verifiers.drain())


def fill_store(
    store: CompletionStore,
    problems: list[Problem],
    *,
    policy: Policy,
    template: PromptTemplate,
    verifiers: VerifierPool,
    params: SamplingParams,
    e_step: EStepParams,
    seed: int,
    iteration: int,
    purpose: str = "",
    show: str = "E-step",
    on_part: Callable[[], None] | None = None,
) -> None:
    """Draws what a store still lacks, part by part.

    Parts are claimed from the process group's store, so a fast rank takes more of them.

    Args:
        store: where the parts go; bound to these settings.
        problems: in a fixed order; consecutive ones share a part.
        policy: what samples.
        template: makes the prompts.
        verifiers: a drained pool.
        params: how to sample.
        e_step: the size of the parts and the alarm.
        seed: part of the address of every draw.
        iteration: part of the address of every draw.
        purpose: see `verified_completions`.
        show: title of the progress bar.
        on_part: called after each part that this rank has written.

    Raises:
        UserError: the store was made with other settings, or the verifier is broken.
    """
    size = e_step.problems_per_part
    parts = [problems[first : first + size] for first in range(0, len(problems), size)]
    part_of = {p.problem_id: number for number, part in enumerate(parts) for p in part}
    if is_rank_zero():
        store.check_key(
            pool_key(
                policy=policy, template=template, verifiers=verifiers, params=params,
                problems=problems, problems_per_part=size, seed=seed, iteration=iteration,
            )
        )  # fmt: skip
    done = {part.index for part in store.parts()}
    claimed = claims(f"{purpose}{iteration}", len(parts))

    def work() -> Iterator[tuple[Problem, tuple[int, ...]]]:
        for number in claimed:
            if number not in done:
                for problem in parts[number]:
                    yield problem, tuple(range(params.n))

    progress, start = Progress(), time.monotonic()
    collected: dict[int, list[Completion]] = defaultdict(list)
    left = sum(len(part) for number, part in enumerate(parts) if number not in done) * params.n
    with _Bar(show, left) as bar:
        for completion in verified_completions(
            work(), policy=policy, template=template, verifiers=verifiers, params=params,
            seed=seed, iteration=iteration, purpose=purpose,
        ):  # fmt: skip
            progress.add(completion)
            progress.check(e_step.max_error_rate, completion)
            number = part_of[completion.problem_id]
            collected[number].append(completion)
            if len(collected[number]) == len(parts[number]) * params.n:
                store.write_part(number, _in_order(collected.pop(number), parts[number]))
                if on_part is not None:
                    on_part()
            bar.set_postfix_str(progress.summary(time.monotonic() - start), refresh=False)
            bar.update()


def _in_order(completions: list[Completion], problems: list[Problem]) -> list[Completion]:
    """Returns completions in order of their problems, then of their indices."""
    place = {problem.problem_id: place for place, problem in enumerate(problems)}
    return sorted(completions, key=lambda one: (place[one.problem_id], one.completion_index))


class _Bar(tqdm):
    """Progress on rank 0: a bar on a terminal, else a plain line a minute."""

    def __init__(self, title: str, total: int):
        self._is_bar = sys.stderr.isatty()
        every_s = 0.1 if self._is_bar else LINE_EVERY_S
        super().__init__(
            desc=title,
            total=total,
            unit="completion",
            disable=not is_rank_zero(),
            mininterval=every_s,
            maxinterval=max(every_s, 10.0),
            delay=0.0 if self._is_bar else every_s,
            bar_format=None if self._is_bar else LINE_FORMAT,
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Shows the current state; called by tqdm."""
        if self._is_bar:
            return super().display(msg, pos)
        print(str(self) if msg is None else msg, file=sys.stderr)
        return True


def claims(name: str, num_parts: int) -> Iterator[int]:
    """Yields the parts that this rank works on, one at a time, each part to one rank only."""
    if not is_distributed():
        yield from range(num_parts)
        return
    # The process group's own store; torch has no public name for it.
    store = dist.distributed_c10d._get_default_store()
    while (number := store.add(f"restem/{name}", 1) - 1) < num_parts:
        yield number


def prepare_problems(
    problems: list[Problem], verifiers: VerifierPool, *, name: str, warn: Callable[[str], None]
) -> list[Problem]:
    """Returns the problems whose own reference the verifier accepts.

    Args:
        problems: as loaded.
        verifiers: a drained pool.
        name: of the set, for messages.
        warn: takes the lines about what was dropped.

    Raises:
        UserError: there is no problem, none has a reference, or the verifier accepts none.
    """
    if not problems:
        raise UserError(f"problems.{name} is empty; check its path, split and num")
    kept, dropped = check_references(problems, verifiers)
    if not kept:
        problem, verdict = dropped[0]
        raise UserError(
            f"problems.{name}: the verifier accepts the reference of none of the {len(problems)} "
            f"problems ({problem.problem_id}: {verdict.kind.value}, {verdict.detail}); give "
            "problems with reference answers, or the verifier that fits them"
        )
    for problem, verdict in dropped[:5]:
        warn(
            f"problems.{name}: {problem.problem_id} is dropped, its own reference is judged "
            f"{verdict.kind.value} ({verdict.detail})"
        )
    if len(dropped) > 5:
        warn(f"problems.{name}: {len(dropped) - 5} more are dropped for the same kind of reason")
    return kept
