"""ReSTEMCallback: E-step before the weights are built, D_val in the M-step, export, metrics."""

import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from restem_lightning.completions import CompletionStore
from restem_lightning.errors import UserError
from restem_lightning.loop.e_step import EStepParams, fill_store
from restem_lightning.loop.evaluate import EvaluationParams, draw_evaluation, measure, total_reward
from restem_lightning.loop.parity import measure_parity, parity_warning
from restem_lightning.loop.pool_cache import is_shared
from restem_lightning.loop.progress import Stopwatch
from restem_lightning.loop.quota import count_skipped
from restem_lightning.loop.ranks import barrier, is_rank_zero, rank_and_count
from restem_lightning.loop.stage import Policy, Stage, load_policy
from restem_lightning.loop.tracking import Tracker
from restem_lightning.loop.weights import hand_over, release_memory
from restem_lightning.m_step.export import export_policy, load_best
from restem_lightning.problems import Problem
from restem_lightning.prompts import PromptTemplate
from restem_lightning.run_dir import IterationDir, RunDir, read_json, write_json
from restem_lightning.sampler import EngineParams, SamplingParams
from restem_lightning.selection import (
    SelectionParams,
    empty_reason,
    end_with_eos,
    select_completions,
    write_accepted,
)
from restem_lightning.verifiers import VerifierPool

MAX_TABLE_ROWS = 1000
VALIDATION_CACHE_TOKENS = 65536  # of the sampler that measures D_val within the M-step


@dataclass(frozen=True, kw_only=True)
class Loop:
    """What all iterations of a run share.

    Args:
        run: the run folder.
        base: folder of the base model.
        seed: of the run; part of the address of every draw.
        train: problems of the E-step.
        validation: D_val, problems that decide when an M-step stops; may be empty.
        held_out: evaluation sets by name.
        template: makes the prompts.
        verifiers: pool of the verifier.
        sampling: of the E-step.
        validation_sampling: of D_val.
        engine: how the sampler uses the machine.
        e_step: size of parts, alarm, quota, parity.
        selection: which completions are accepted.
        evaluation: how policies are measured.
        tracker: sends metrics to where they are watched.
        check_stop: raises if the run is to stop; called where nothing is lost.
    """

    run: RunDir
    base: str
    seed: int
    train: list[Problem]
    validation: list[Problem]
    held_out: dict[str, list[Problem]]
    template: PromptTemplate
    verifiers: VerifierPool
    sampling: SamplingParams
    validation_sampling: SamplingParams
    engine: EngineParams
    e_step: EStepParams
    selection: SelectionParams
    evaluation: EvaluationParams
    tracker: Tracker
    check_stop: Callable[[], None]

    def stage(self, policy: Policy, iteration: int) -> Stage:
        """Returns how a policy draws in an iteration, with the settings of the E-step."""
        return Stage(
            policy=policy,
            template=self.template,
            verifiers=self.verifiers,
            params=self.sampling,
            seed=self.seed,
            iteration=iteration,
        )


class ReSTEMCallback(Callback):
    """Runs all of an iteration that is not the M-step; new for each iteration."""

    def __init__(self, loop: Loop, iteration: int, *, sampler_policy: str, trained_from: str):
        """Prepares one iteration.

        Args:
            loop: what all iterations share.
            iteration: 1-based.
            sampler_policy: folder of the policy that samples in this E-step.
            trained_from: folder of the weights that this M-step starts from.
        """
        self.loop, self.iteration = loop, iteration
        self.sampler_policy, self.trained_from = sampler_policy, trained_from
        self.paths = loop.run.iteration(iteration)
        self.parity_json = self.paths.path / "parity.json"
        self.validation_policy: Policy | None = None
        self.val_rewards: list[tuple[int, float]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The E-step: here ranks are connected and no training weights are in memory yet."""
        self.loop.check_stop()
        base_is_measured = self.loop.run.iteration(0).metrics.exists()
        if not (self.paths.funnel.exists() and base_is_measured):
            policy = load_policy(self.sampler_policy, self.loop.engine)
            if self.iteration == 1 and not base_is_measured:
                self._measure(0, policy)
            if not self.paths.funnel.exists():
                self._e_step(policy)
            del policy
            release_memory()
        self._check_parity()
        funnel = read_json(self.paths.funnel)
        if funnel["accepted"] == 0:
            raise UserError(f"the accepted dataset is empty: {empty_reason(funnel)}")
        check_interval(trainer, -(-funnel["accepted"] // trainer.datamodule.batch_size))
        trainer.datamodule.accepted = str(self.paths.accepted)
        self.watch = self._stopwatch("m_step")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stops before the next optimizer step if a signal asked for it."""
        self.loop.check_stop()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the reward on D_val with the current weights, for the stop rule."""
        if self.loop.validation:
            reward = self._validation_reward(pl_module)
            self.val_rewards.append((trainer.global_step, reward))
            pl_module.log("val_reward", reward, prog_bar=True)
        self.watch.lap()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports the best weights as this iteration's policy."""
        self.validation_policy = None
        release_memory()
        self._export(trainer, pl_module)
        self.watch.lap()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Measures the new policy and finishes the iteration."""
        if not self.paths.policy.exists():  # resumed at trainer.max_steps: no on_train_end then
            self._export(trainer, pl_module)
        pl_module.model = None
        release_memory()
        self._measure(self.iteration, load_policy(str(self.paths.policy), self.loop.engine))
        release_memory()

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed M-step must still know."""
        return {"val_rewards": self.val_rewards}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.val_rewards = list(state_dict["val_rewards"])

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lets a run folder be moved: Lightning forgets the best weights of another folder."""
        here = self.paths.m_step.resolve()
        for state in checkpoint["callbacks"].values():
            if Path(state.get("dirpath", "")).parts[-2:] == here.parts[-2:]:
                for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
                    state[key] = _moved(state[key], here)
                scores = state["best_k_models"].items()
                state["best_k_models"] = {_moved(path, here): score for path, score in scores}
                state["dirpath"] = str(here)

    def _e_step(self, policy: Policy) -> None:
        """Draws, verifies and selects; writes accepted.parquet, then funnel.json."""
        loop, store = self.loop, CompletionStore(self.paths.completions)
        watch = self._stopwatch("e_step")

        def on_part() -> None:
            watch.lap()
            loop.check_stop()

        fill_store(
            store,
            loop.train,
            loop.stage(policy, self.iteration),
            e_step=loop.e_step,
            quota=loop.selection if loop.e_step.stop_at_quota else None,
            show=f"E-step {self.iteration}",
            on_part=on_part,
        )
        barrier()
        watch.lap()
        if is_rank_zero():
            self._select(store, policy)
        barrier()

    def _select(self, store: CompletionStore, policy: Policy) -> None:
        store.verify_checksums()
        selection = select_completions(store, **asdict(self.loop.selection))
        num_skipped = count_skipped(selection.funnel, self.loop.sampling.n)
        funnel = {**selection.funnel, "num_skipped": num_skipped}
        stages = ("completions", "not_truncated", "correct", "distinct", "accepted")
        print(
            f"iteration {self.iteration}: "
            + " -> ".join(f"{stage.replace('_', ' ')} {funnel[stage]}" for stage in stages)
            + f"; {funnel['num_solved']} of {funnel['num_problems']} problems solved"
            + (f"; {num_skipped} not drawn, the quota was met" if num_skipped else "")
        )
        self.loop.tracker.log_completions(self.iteration, store, MAX_TABLE_ROWS)
        accepted = end_with_eos(selection.accepted, policy.sampler.eos_ids)
        write_accepted(self.paths.accepted, accepted)
        self.parity_json.unlink(missing_ok=True)  # that of another pool
        write_json(self.paths.funnel, funnel)

    def _check_parity(self) -> None:
        """Lets the trainer's forward pass score a slice of the pool, once; the sampler is gone."""
        num = self.loop.e_step.parity_completions
        if num == 0:
            return
        if is_rank_zero() and not self.parity_json.exists():
            watch = self._stopwatch("parity")
            parity = measure_parity(
                CompletionStore(self.paths.completions),
                self.sampler_policy,
                num_completions=num,
                device=self.loop.engine.resolve_device(),
            )
            release_memory()
            watch.lap()
            if warning := parity_warning(parity, self.sampler_policy):
                print(f"restem fit: iteration {self.iteration}: {warning}", file=sys.stderr)
            write_json(self.parity_json, parity)
        barrier()

    def _validation_reward(self, pl_module: LightningModule) -> float:
        """Returns the mean reward over D_val; each rank samples its share of the problems."""
        loop = self.loop
        if self.validation_policy is None:
            # Beside the trainer's memory: not most of what happens to be free between its steps.
            tokens = loop.engine.cache_tokens or VALIDATION_CACHE_TOKENS
            engine = replace(loop.engine, cache_tokens=tokens)
            self.validation_policy = load_policy(pl_module.policy, engine)
        hand_over(pl_module.model, self.validation_policy.sampler)
        rank, num_ranks = rank_and_count()
        share = loop.validation[rank::num_ranks]
        total = torch.zeros(1, dtype=torch.float64, device=pl_module.device)
        if share:
            stage = loop.stage(self.validation_policy, self.iteration)
            total += total_reward(
                share, replace(stage, params=loop.validation_sampling, purpose="validation/")
            )
        if num_ranks > 1:
            dist.all_reduce(total)
        return total.item() / (len(loop.validation) * loop.validation_sampling.n)

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        best = next(
            (c for c in trainer.checkpoint_callbacks if c.monitor and c.best_model_path), None
        )
        if best is None and any(c.monitor for c in trainer.checkpoint_callbacks):
            raise UserError(
                "the M-step ended before its first look at D_val; lower trainer.val_check_interval "
                f"({trainer.val_check_interval}) or set stop.rule to none"
            )
        if is_rank_zero():
            step, reward = max(self.val_rewards, key=lambda pair: pair[1], default=(None, None))
            record = {
                "optimizer_steps": trainer.global_step,
                "best_val_reward": reward,
                "best_optimizer_step": step,
                "val_rewards": [list(pair) for pair in self.val_rewards],
            }
            write_json(self.paths.m_step / "m_step.json", record)
        if best is not None:
            load_best(pl_module, best.best_model_path)
        export_policy(pl_module, self.paths.policy, source_policy=pl_module.policy)

    def _measure(self, iteration: int, policy: Policy) -> None:
        """Evaluates a policy on every set and writes the iteration's metrics, then its manifest."""
        loop, paths = self.loop, self.loop.run.iteration(iteration)
        watch = Stopwatch(paths.path / "seconds.json", "evaluation")
        for name, problems in loop.held_out.items():
            draw_evaluation(
                paths.path / "evaluation" / name,
                name,
                problems,
                loop.evaluation,
                loop.stage(policy, iteration),
                e_step=loop.e_step,
                on_part=watch.lap,
            )
        barrier()
        watch.lap()
        if is_rank_zero():
            self._finish(iteration, paths, policy)
        barrier()

    def _finish(self, iteration: int, paths: IterationDir, policy: Policy) -> None:
        loop = self.loop
        metrics = {
            "iteration": iteration,
            "evaluation": {
                name: measure(paths.path / "evaluation" / name, loop.evaluation)
                for name in loop.held_out
            },
            "e_step": _e_step_metrics(paths) if iteration else {},
            "m_step": read_json(paths.m_step / "m_step.json") if iteration else {},
            "seconds": read_json(paths.path / "seconds.json"),
        }
        write_json(paths.metrics, metrics)
        loop.tracker.log_iteration(metrics)
        for name, values in metrics["evaluation"].items():
            shown = ", ".join(f"{key} {100 * one['value']:.1f} %" for key, one in values.items())
            print(f"iteration {iteration}: {name} {shown}")
        if iteration:
            write_json(
                paths.manifest,
                {
                    "iteration": iteration,
                    "sampler_policy": self.sampler_policy,
                    "trained_from": self.trained_from,
                    "policy_hash": policy.hash,
                },
            )
            _remove_checkpoints(paths.m_step)

    def _stopwatch(self, stage: str) -> Stopwatch:
        return Stopwatch(self.paths.path / "seconds.json", stage)


def check_interval(trainer: Trainer, num_steps: int) -> None:
    """Checks that an epoch of num_steps optimizer steps is long enough for a look at D_val.

    Raises:
        UserError: the first look would come after the end of the epoch.
    """
    every = trainer.val_check_interval
    if isinstance(every, int) and trainer.check_val_every_n_epoch and every > num_steps:
        raise UserError(
            f"trainer.val_check_interval ({every}) must be at most the {num_steps} optimizer steps "
            "of an epoch; lower it, give a share such as 0.5, or set "
            "trainer.check_val_every_n_epoch to null to count across epochs"
        )


def _moved(path: str, folder: Path) -> str:
    """Returns where a file is now that its folder is this one; an empty path stays empty."""
    return path and str(folder / Path(path).name)


def _remove_checkpoints(folder: Path) -> None:
    """Deletes what only a resumed M-step needs: it is several times the size of the policy."""
    for path in folder.glob("*.ckpt"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _e_step_metrics(paths: IterationDir) -> dict[str, Any]:
    """Returns the E-step's part of metrics.json, from the pool and the funnel."""
    funnel = read_json(paths.funnel)
    num_tokens, reasons = 0, Counter()
    store = CompletionStore(paths.completions)
    for batch in store.iter_batches(["completion_ids", "finish_reason"]):
        num_tokens += len(batch["completion_ids"].flatten())
        reasons.update(batch["finish_reason"].to_pylist())
    seconds = read_json(paths.path / "seconds.json").get("e_step", 0.0)
    parity, shared = paths.path / "parity.json", is_shared(store)
    return {
        "num_problems": funnel["num_problems"],
        "num_completions": funnel["completions"],
        "num_skipped": funnel["num_skipped"],
        "num_correct": funnel["correct"],
        "acceptance_rate": funnel["acceptance_rate"],
        "num_solved": funnel["num_solved"],
        "num_accepted": funnel["accepted"],
        "num_tokens": num_tokens,
        "seconds": seconds,
        "tokens_per_s": round(num_tokens / seconds, 1) if seconds and not shared else None,
        "shared": shared,
        "verdicts": funnel["verdicts"],
        "finish_reasons": dict(sorted(reasons.items())),
        "parity": read_json(parity) if parity.exists() else None,
    }
