"""A verifier learned from a run's own pools, and best-of-k by it (V-STaR)."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from transformers import AutoTokenizer

from restem_lightning.completion_store import CompletionStore
from restem_lightning.completions import SCHEMA, VerdictKind, from_table
from restem_lightning.errors import UserError
from restem_lightning.loop.mixing import human_solutions
from restem_lightning.loop.ranks import barrier, is_missing, is_rank_zero
from restem_lightning.loop.shared import Loop
from restem_lightning.loop.stage import eos_ids
from restem_lightning.loop.stoppable import StoppableTraining, stop_if_asked
from restem_lightning.loop.weights import release_memory
from restem_lightning.m_step.checkpoints import remove_checkpoints
from restem_lightning.m_step.export import export_policy
from restem_lightning.m_step.preference import (
    PairSet,
    PreferenceModule,
    pair_loader,
    read_pairs,
    remove_pairs,
    write_pairs,
)
from restem_lightning.m_step.stopping import resume_checkpoint, stop_callbacks
from restem_lightning.metrics import best_of_k, bootstrap
from restem_lightning.problems import Problem
from restem_lightning.run_dir import IterationDir, RunDir, read_json, write_json
from restem_lightning.scoring import LikelihoodScorer
from restem_lightning.selection.pairs import stream_pairs

Learn = Literal["never", "last", "each"]


@dataclass(frozen=True, kw_only=True)
class PreferenceParams:
    """A verifier that learns by DPO from pairs of correct and incorrect completions.

    It reads the pools of all iterations so far, lies in iteration_<t>/verifier and ranks the
    sampled completions of evaluation: best@k beside pass@k. What is accepted does not change.

    Args:
        learn: after which iterations: never, the last one, or each.
        start_from: weights that it starts from, its reference too: base, iteration_<t> for that
            policy of this run, or a folder; with the policy's tokenizer.
        human: whether human solutions count as correct completions.
        max_pairs_per_problem: most pairs of a problem, drawn at random; null for all.
        beta: DPO's beta; the lower, the farther the verifier may go from where it starts.
        score: likelihood ranks by log V(completion | prompt) as arXiv 2402.06457 does; ratio by
            DPO's implicit reward.
        learning_rate: of AdamW, constant.
        batch_size: pairs of an optimizer step, over all ranks.
        max_epochs: passes over the pairs.
        tokens_per_batch: most tokens that are scored at once; changes no result.
    """

    learn: str = "never"
    start_from: str = "base"
    human: bool = False
    max_pairs_per_problem: int | None = None
    beta: float = 0.1
    score: str = "likelihood"
    learning_rate: float = 1e-6
    batch_size: int = 32
    max_epochs: int = 1
    tokens_per_batch: int = 8192

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is not allowed.
        """
        for name, value, allowed in (
            ("learn", self.learn, get_args(Learn)),
            ("score", self.score, ("likelihood", "ratio")),
        ):
            if value not in allowed:
                raise UserError(f"preference.{name} ({value}) must be one of {', '.join(allowed)}")
        for name in ("beta", "learning_rate", "batch_size", "max_epochs", "max_pairs_per_problem"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise UserError(f"preference.{name} ({value}) must be above 0")


def wants_verifier(params: PreferenceParams, run: RunDir, iteration: int, *, is_last: bool) -> bool:
    """Returns whether a finished iteration still lacks the verifier that it should have."""
    wanted = params.learn == "each" or (params.learn == "last" and is_last)
    has_pools = any(
        run.iteration(number).completions.exists() for number in range(1, iteration + 1)
    )
    return wanted and has_pools and not run.iteration(iteration).verifier_json.exists()


def learn_verifier(
    loop: Loop,
    iteration: int,
    params: PreferenceParams,
    *,
    start: str,
    make_trainer: Callable[..., Trainer],
) -> None:
    """Trains an iteration's verifier and measures best-of-k by it; every rank must call it.

    The training is stopped, saved and gone on with as an M-step is, its checkpoints are written
    where an M-step would look at D_val.

    Args:
        loop: what all iterations share.
        iteration: a finished one.
        params: how.
        start: folder of the weights to start from.
        make_trainer: takes what a Trainer needs beside the settings `trainer`.

    Raises:
        UserError: there is no pair to learn from.
        Stopped: that was asked for.
    """
    paths = loop.run.iteration(iteration)
    file = paths.verifier_training / "pairs"
    if is_rank_zero():
        write_pairs(file, _pairs(loop, iteration, params))
    barrier(loop.stop.is_leaving, written=file)
    data = read_pairs(file)
    if is_missing(paths.verifier, loop.stop.is_leaving):
        _train(loop, paths, params, data, start=start, make_trainer=make_trainer)
    if is_rank_zero():
        remove_checkpoints(paths.verifier_training)
        remove_pairs(file)
        _measure(loop, paths, params, start=start, num_pairs=len(data.pairs))
    barrier(loop.stop.is_leaving, written=paths.verifier_json)


def score_evaluation(
    folder: Path, problems: list[Problem], scorer: LikelihoodScorer
) -> dict[str, list[tuple[bool, float]]]:
    """Returns, for each problem, (correct, score) of its sampled completions, in their order."""
    by_id = {problem.problem_id: problem for problem in problems}
    scored: dict[str, list[tuple[int, bool, float]]] = defaultdict(list)
    for part in CompletionStore(folder / "sampled").iter_parts(SCHEMA.names):
        completions = from_table(part)
        scores = scorer.score([(by_id[one.problem_id], one) for one in completions])
        for one, score in zip(completions, scores, strict=True):
            is_correct = one.verdict.kind is VerdictKind.CORRECT
            scored[one.problem_id].append((one.completion_index, is_correct, score))
    return {
        problem_id: [(correct, score) for _, correct, score in sorted(rows)]
        for problem_id, rows in scored.items()
    }


def _pairs(
    loop: Loop, iteration: int, params: PreferenceParams
) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """Yields the pairs of all pools so far; what was drawn with a hint is in none.

    Raises:
        UserError: there is none.
    """
    folders = [loop.run.iteration(number).completions for number in range(1, iteration + 1)]
    human: Iterable[pa.Table] = ()
    if params.human:
        tokenizer = AutoTokenizer.from_pretrained(loop.base)
        human = human_solutions(loop.train, loop.template, tokenizer, 1.0)
    pieces = stream_pairs(
        [CompletionStore(pool) for one in folders for pool in (one, *sorted(one.glob("policy_*")))],
        human=human,
        eos_ids=eos_ids(loop.base, loop.template),
        max_per_problem=params.max_pairs_per_problem,
        seed=loop.seed,
    )
    first = next(pieces, None)
    if first is None:
        raise UserError(
            "preference: no problem has both a correct and an incorrect completion; draw more per "
            "problem (sampling.n), or set preference.learn to never"
        )
    yield first
    yield from pieces


def _train(
    loop: Loop,
    paths: IterationDir,
    params: PreferenceParams,
    data: PairSet,
    *,
    start: str,
    make_trainer: Callable[..., Trainer],
) -> None:
    """Trains the verifier of an iteration and exports it."""
    folder = paths.verifier_training
    module = PreferenceModule(
        start,
        data,
        beta=params.beta,
        learning_rate=params.learning_rate,
        tokens_per_batch=params.tokens_per_batch,
    )
    loader = pair_loader(data, batch_size=params.batch_size, seed=loop.seed)
    trainer = make_trainer(
        callbacks=[StoppableTraining(loop.stop, folder), *stop_callbacks("none", folder=folder)],
        logger=CSVLogger(folder, name="log"),
        default_root_dir=str(folder),
        max_epochs=params.max_epochs,
        max_steps=-1,
        limit_val_batches=1,
    )
    if isinstance(trainer.val_check_interval, int):  # an M-step may have more optimizer steps
        trainer.val_check_interval = min(trainer.val_check_interval, len(loader))
    loop.stop.is_patient = True  # ranks are connected now: only together can they stop
    trainer.fit(module, loader, range(1), ckpt_path=resume_checkpoint(folder))
    export_policy(module, paths.verifier, source_policy=start)
    module.model = None
    release_memory()
    stop_if_asked(trainer, loop.stop)


def _measure(
    loop: Loop,
    paths: IterationDir,
    params: PreferenceParams,
    *,
    start: str,
    num_pairs: int,
) -> None:
    """Writes best@k of every evaluation set to metrics.json, then verifier.json."""
    scorer = LikelihoodScorer(
        str(paths.verifier),
        reference=start if params.score == "ratio" else None,
        beta=params.beta if params.score == "ratio" else 1.0,
        tokens_per_batch=params.tokens_per_batch,
        device=loop.engine.resolve_device().type,
    )
    metrics = read_json(paths.metrics)
    best: dict[str, dict[str, Any]] = {}
    for name, problems in loop.held_out.items() if loop.evaluation.n > 1 else ():
        place = paths.path / "evaluation" / name
        scored = score_evaluation(place, problems, scorer)
        write_json(place / "scores.json", scored)
        best[name] = {
            f"best@{k}": bootstrap(
                [best_of_k(*zip(*rows, strict=True), k) for rows in scored.values()]
            ).to_dict()
            for k in loop.evaluation.ks
            if k > 1
        }
        metrics["evaluation"][name].update(best[name])
        shown = ", ".join(f"{key} {100 * one['value']:.1f} %" for key, one in best[name].items())
        print(f"verifier of iteration {metrics['iteration']}: {name} {shown}")
    write_json(paths.metrics, metrics)
    record = {"num_pairs": num_pairs, "evaluation": best, "started_from": start}
    write_json(paths.verifier_json, record)
    loop.tracker.catch_up()
