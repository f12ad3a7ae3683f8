"""ReSTEMCallback: E-step before the weights are built, D_val in the M-step, export, metrics."""

import sys
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from restem_lightning.completion_store import CompletionStore
from restem_lightning.errors import UserError
from restem_lightning.loop.evaluate import draw_evaluation, measure, total_reward
from restem_lightning.loop.iteration import EStep
from restem_lightning.loop.parity import measure_parity, parity_warning
from restem_lightning.loop.progress import Stopwatch
from restem_lightning.loop.ranks import barrier, is_missing, is_rank_zero, rank_and_count
from restem_lightning.loop.shared import Loop
from restem_lightning.loop.stage import Policy, load_policy
from restem_lightning.loop.stoppable import stop_if_asked
from restem_lightning.loop.weights import hand_over, held_memory_mib, release_memory
from restem_lightning.m_step.checkpoints import remove_checkpoints
from restem_lightning.m_step.export import export_policy, load_best
from restem_lightning.m_step.optimizer_state import load_optimizer, save_optimizer
from restem_lightning.m_step.sequences import remove_sequences
from restem_lightning.m_step.stopping import best_checkpoint
from restem_lightning.run_dir import IterationDir, RunDir, read_json, write_json
from restem_lightning.selection import empty_reason

VALIDATION_CACHE_TOKENS = 65536  # of the sampler that measures D_val within the M-step


class ReSTEMCallback(Callback):
    """Runs all of an iteration that is not the M-step; new for each iteration."""

    def __init__(self, loop: Loop, iteration: int, *, policies: list[str], trained_from: str):
        """Prepares one iteration.

        Args:
            loop: what all iterations share.
            iteration: 1-based.
            policies: folders of the policies that sample in this E-step.
            trained_from: folder of the weights that this M-step starts from.
        """
        self.loop, self.iteration = loop, iteration
        self.policies, self.trained_from = policies, trained_from
        self.e_step = EStep(loop, iteration, policies)
        self.paths = loop.run.iteration(iteration)
        self.parity_json = self.paths.path / "parity.json"
        self.m_step_json = self.paths.m_step / "m_step.json"
        self.validation_policy: Policy | None = None
        self.val_rewards: list[tuple[int, float]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The E-step: here ranks are connected and no training weights are in memory yet."""
        run, is_leaving = self.loop.run, self.loop.stop.is_leaving
        barrier(is_leaving, written=run.run_json)
        if self.iteration == 1 and is_missing(run.iteration(0).metrics, is_leaving):
            self._measure(0, self.loop.base)
        if any(is_missing(file, is_leaving) for file in (self.paths.funnel, self.paths.accepted)):
            self.e_step.run(self._stopwatch("e_step").lap)
            stop_if_asked(trainer, self.loop.stop)
        self._check_parity()
        funnel = read_json(self.paths.funnel)
        if funnel["trained_on"] == 0:
            raise UserError(f"the accepted dataset is empty: {empty_reason(funnel)}")
        check_interval(trainer, -(-funnel["trained_on"] // trainer.datamodule.batch_size))
        trainer.datamodule.accepted = str(self.paths.accepted)
        self._note_memory(self.iteration, "e_step")
        self.watch = self._stopwatch("m_step")
        if not self._lacks_policy():  # optimizer steps taken again may round otherwise
            trainer.limit_train_batches = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Goes on with the optimizer's state if wanted."""
        before = self.loop.run.iteration(self.iteration - 1).optimizer
        # A resumed M-step has its own state already.
        if self.loop.carry_optimizer and before.exists() and trainer.global_step == 0:
            load_optimizer(pl_module.model, trainer.optimizers[0], before)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the reward on D_val with the current weights, for the stop rule."""
        if self.loop.validation:
            reward = self._validation_reward(pl_module)
            self.val_rewards.append((trainer.global_step, reward))
            pl_module.log("val_reward", reward, prog_bar=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports the best weights as this iteration's policy."""
        self.validation_policy = None
        release_memory()
        self._export(trainer, pl_module)
        barrier(self.loop.stop.is_leaving, written=self.paths.policy)
        self.watch.lap()
        stop_if_asked(trainer, self.loop.stop)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Measures the new policy and finishes the iteration."""
        is_leaving = self.loop.stop.is_leaving
        if self._lacks_policy():  # resumed at max_steps: no on_train_end then
            self._export(trainer, pl_module)
            barrier(is_leaving, written=self.paths.policy)
        pl_module.model = None
        release_memory()
        self._note_memory(self.iteration, "m_step")
        if trainer.progress_bar_callback is not None:  # first: a live display would show each state
            trainer.progress_bar_callback.teardown(trainer, pl_module, stage)  # of ours as a line
        self._measure(self.iteration, str(self.paths.policy))

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Writes down the seconds that it took to come here."""
        self.watch.lap()

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed M-step must still know."""
        return {"val_rewards": self.val_rewards}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.val_rewards = list(state_dict["val_rewards"])

    def _lacks_policy(self) -> bool:
        """Returns on every rank whether the policy, or its record, is still to come."""
        files = (self.m_step_json, self.paths.policy)
        return any(is_missing(file, self.loop.stop.is_leaving) for file in files)

    def _check_parity(self) -> None:
        """Lets the trainer's forward pass score a slice of the pool, once; the sampler is gone."""
        num = self.loop.e_step.parity_completions
        if num == 0 or not self.e_step.is_drawn_here:
            return
        if is_rank_zero() and not self.parity_json.exists():
            watch = self._stopwatch("parity")
            parity = measure_parity(
                CompletionStore(self.paths.completions),
                self.policies[0],
                num_completions=num,
                device=self.loop.engine.resolve_device(),
            )
            release_memory()
            watch.lap()
            if warning := parity_warning(parity, self.policies[0]):
                print(f"restem fit: iteration {self.iteration}: {warning}", file=sys.stderr)
            write_json(self.parity_json, parity)
        barrier(self.loop.stop.is_leaving)

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
        best = best_checkpoint(trainer)
        if best is not None and not best.best_model_path:
            raise UserError(
                "the M-step ended before its first look at D_val; lower trainer.val_check_interval "
                f"({trainer.val_check_interval}) or set stop.rule to none"
            )
        looked_at = self.val_rewards[-1][0] if self.val_rewards else None
        if best is None and self.loop.validation and looked_at != trainer.global_step:
            # The last weights become the policy, wherever in an epoch the M-step ended.
            self.val_rewards.append((trainer.global_step, self._validation_reward(pl_module)))
            self.validation_policy = None
            release_memory()
        if is_rank_zero():
            step, reward = max(self.val_rewards, key=lambda pair: pair[1], default=(None, None))
            record = {
                "optimizer_steps": trainer.global_step,
                "val_reward": self._reward_of_policy(is_best=best is not None),
                "best_val_reward": reward,
                "best_optimizer_step": step,
                "val_rewards": [list(pair) for pair in self.val_rewards],
            }
            write_json(self.m_step_json, record)
        if self.loop.carry_optimizer:
            save_optimizer(pl_module.model, trainer.optimizers[0], self.paths.optimizer)
        if best is not None:
            load_best(pl_module, best.best_model_path)
        export_policy(pl_module, self.paths.policy, source_policy=pl_module.policy)

    def _reward_of_policy(self, *, is_best: bool) -> float | None:
        """Returns the reward on D_val of the weights that are exported, None without D_val."""
        rewards = [reward for _, reward in self.val_rewards]
        return (max(rewards) if is_best else rewards[-1]) if rewards else None

    def _measure(self, iteration: int, folder: str) -> None:
        """Evaluates a policy on every set and writes the iteration's metrics, then its manifest."""
        loop, paths = self.loop, self.loop.run.iteration(iteration)
        policy = load_policy(folder, loop.engine)
        stage, hash_of_policy = loop.stage(policy, iteration), policy.hash
        watch = Stopwatch(paths.path / "seconds.json", "evaluation")
        for name, problems in loop.held_out.items():
            draw_evaluation(
                paths.path / "evaluation" / name,
                name,
                problems,
                loop.evaluation,
                stage,
                e_step=loop.e_step,
                on_part=watch.lap,
            )
        del policy, stage
        release_memory()
        barrier(loop.stop.is_leaving)
        watch.lap()
        self._note_memory(iteration, "evaluation")
        if is_rank_zero():
            self._finish(iteration, paths, hash_of_policy)
        barrier(loop.stop.is_leaving, written=paths.manifest if iteration else paths.metrics)

    def _note_memory(self, iteration: int, stage: str) -> None:
        """Writes down what rank 0 still holds behind a stage: it should not grow."""
        if is_rank_zero() and (memory := held_memory_mib()) is not None:
            path = self.loop.run.iteration(iteration).memory
            write_json(path, {**(read_json(path) if path.exists() else {}), stage: memory})

    def _finish(self, iteration: int, paths: IterationDir, policy_hash: str) -> None:
        loop = self.loop
        metrics = {
            "iteration": iteration,
            "evaluation": {
                name: measure(paths.path / "evaluation" / name, loop.evaluation)
                for name in loop.held_out
            },
            "e_step": self.e_step.metrics() if iteration else {},
            "m_step": read_json(self.m_step_json) if iteration else {},
            "seconds": read_json(paths.path / "seconds.json"),
            "memory_mib": read_json(paths.memory) if paths.memory.exists() else {},
        }
        write_json(paths.metrics, metrics)
        for name, values in metrics["evaluation"].items():
            shown = ", ".join(f"{key} {100 * one['value']:.1f} %" for key, one in values.items())
            print(f"iteration {iteration}: {name} {shown}")
        if iteration:
            write_json(
                paths.manifest,
                {
                    "iteration": iteration,
                    "sampler_policy": self.policies[0],
                    "sampler_policies": self.policies,
                    "pool_iteration": self.e_step.pool_iteration,
                    "trained_from": self.trained_from,
                    "policy_hash": policy_hash,
                },
            )
            remove_training_files(loop.run, iteration)
        loop.tracker.catch_up()

    def _stopwatch(self, stage: str) -> Stopwatch:
        return Stopwatch(self.paths.path / "seconds.json", stage)


def remove_training_files(run: RunDir, iteration: int) -> None:
    """Deletes what a finished iteration does not need any more, several times its policy."""
    paths = run.iteration(iteration)
    remove_checkpoints(paths.m_step)
    remove_sequences(paths.accepted)
    run.iteration(iteration - 1).optimizer.unlink(missing_ok=True)


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
