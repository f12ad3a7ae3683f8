"""Replay: one stored completion drawn again from its address, alone in the batch."""

import json
from dataclasses import dataclass
from pathlib import Path

from restem_lightning.completion_store import CompletionStore
from restem_lightning.completions import Completion
from restem_lightning.errors import UserError
from restem_lightning.loop.stage import Policy
from restem_lightning.m_step.export import policy_hash
from restem_lightning.run_dir import RunDir, read_json
from restem_lightning.sampler import Request, Sample, SamplingParams
from restem_lightning.settings import resolve_policy

ADDRESS_HELP = (
    "FOLDER:PROBLEM_ID:INDEX, where FOLDER is a pool of completions, such as "
    "runs/quickstart/iteration_1/completions or iteration_1/evaluation/held_out/sampled below it, "
    "and the others are the columns problem_id and completion_index of its parquet parts"
)


def find_completion(address: str) -> tuple[Path, Completion]:
    """Returns the pool's folder and the completion that an address names.

    Args:
        address: FOLDER:PROBLEM_ID:INDEX; folder and problem_id may hold colons themselves.

    Raises:
        UserError: there is no such pool, problem or index, or the part is damaged.
    """
    head, _, index = address.rpartition(":")
    if ":" not in head or not index.isdecimal():
        raise UserError(f"replay ({address}) must be {ADDRESS_HELP}")
    ends = [place for place, character in enumerate(head) if character == ":"]
    end = next((end for end in ends if (Path(head[:end]) / "pool.json").is_file()), None)
    if end is None:
        raise UserError(
            f"replay ({address}): {head[: ends[0]]} is no pool of completions (it has no "
            f"pool.json); give {ADDRESS_HELP}"
        )
    folder, problem_id = Path(head[:end]), head[end + 1 :]
    store = CompletionStore(folder)
    completions = store.completions_of(problem_id)
    if not completions:
        known = [problem_id for part in store.parts() for problem_id in part.problem_ids]
        raise UserError(
            f"replay: {folder} has no completion of problem {problem_id!r}; it has some of "
            f"{len(known)} problems, such as {', '.join(known[:3])}"
        )
    by_index = {completion.completion_index: completion for completion in completions}
    if int(index) not in by_index:
        raise UserError(
            f"replay: {folder} has no completion {index} of problem {problem_id!r}; it has "
            f"{', '.join(map(str, sorted(by_index)))}"
        )
    return folder, by_index[int(index)]


def policy_that_drew(folder: Path, completion: Completion, policy: str | None) -> str:
    """Returns the folder of the policy that drew a completion.

    Args:
        folder: of the pool.
        completion: in it.
        policy: what the user gave, None to look in the run folder that the pool lies in.

    Raises:
        UserError: it is not known, no longer there, or another policy.
    """
    if policy is not None:
        found = resolve_policy(policy)
    else:
        try:
            found = resolve_policy(_policy_in_run(folder))
        except UserError as error:
            raise UserError(
                f"replay: the policy that drew {folder} is not to be found ({error}); give its "
                "folder with --policy"
            ) from error
    if (found_hash := policy_hash(found)) != completion.policy_hash:
        raise UserError(
            f"replay: the policy {found} has the hash {found_hash[:12]}, and one with the hash "
            f"{completion.policy_hash[:12]} drew this completion; give that one with --policy"
        )
    return found


def _policy_in_run(folder: Path) -> str:
    """Returns which policy drew a pool of a run folder.

    The policy of the iteration before drew an E-step, the iteration's own policy its evaluation.

    Raises:
        UserError: the pool does not lie in a run folder.
    """
    pool = folder.resolve()
    for parent in pool.parents:
        run, number = RunDir(parent.parent), parent.name.removeprefix("iteration_")
        if number != parent.name and number.isdecimal() and run.run_json.is_file():
            is_e_step = pool.relative_to(parent).parts[0] in ("completions", "balance")
            drawn_by = int(number) - is_e_step
            if drawn_by < 1:
                return read_json(run.run_json)["settings"]["policy"]
            return str(run.iteration(drawn_by).policy)
    raise UserError("it does not lie in a run folder")


def draw_again(completion: Completion, policy: Policy) -> Sample:
    """Draws a completion again, alone.

    Args:
        completion: as stored.
        policy: the one that drew it.
    """
    request = Request(
        request_id=completion.purpose + completion.problem_id,
        prompt_ids=tuple(completion.prompt_ids),
        num_shared=completion.num_shared,
        indices=(completion.completion_index,),
    )
    (sample,) = policy.sampler.generate(
        [request],
        SamplingParams(**json.loads(completion.sampling)),
        seed=completion.seed,
        iteration=completion.iteration,
        decode=policy.decode,
    )
    return sample


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A stored completion beside what was drawn again.

    Args:
        num_equal: tokens that are equal, counted from the first.
        is_equal: whether all are, and no other follows.
        max_abs_dlogp: largest difference of the log-probabilities (T=1) of the equal tokens.
    """

    num_equal: int
    is_equal: bool
    max_abs_dlogp: float


def compare(completion: Completion, sample: Sample) -> Comparison:
    """Returns how far what was drawn again is what is stored."""
    stored, drawn = completion.completion_ids, list(sample.token_ids)
    num_equal = 0
    for ours, theirs in zip(stored, drawn, strict=False):
        if ours != theirs:
            break
        num_equal += 1
    pairs = list(zip(completion.logprobs, sample.logprobs, strict=False))[:num_equal]
    return Comparison(
        num_equal=num_equal,
        is_equal=stored == drawn,
        max_abs_dlogp=max((abs(ours - theirs) for ours, theirs in pairs), default=0.0),
    )
