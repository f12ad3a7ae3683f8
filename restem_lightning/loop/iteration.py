"""One iteration's E-step: draw, judge, select, mix; what it leaves in the iteration's folder."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
from transformers import AutoTokenizer

from restem_lightning.completion_store import CompletionStore
from restem_lightning.loop.balance import choose_balance
from restem_lightning.loop.draw import draw_pools, pool_stores, problems_of_e_step
from restem_lightning.loop.mixing import mix
from restem_lightning.loop.pool_cache import is_shared
from restem_lightning.loop.quota import count_skipped
from restem_lightning.loop.ranks import barrier, is_rank_zero
from restem_lightning.loop.shared import Loop
from restem_lightning.loop.stage import eos_ids, load_policy
from restem_lightning.loop.weights import release_memory
from restem_lightning.problems import Problem
from restem_lightning.run_dir import RunDir, read_json, write_json
from restem_lightning.selection import (
    end_with_eos,
    iter_accepted,
    stream_accepted,
    write_accepted,
)

STAGES = ("completions", "not_truncated", "correct", "distinct", "accepted")


class EStep:
    """The E-step of one iteration; nothing is drawn or written before `run`."""

    def __init__(self, loop: Loop, iteration: int, policies: Sequence[str]):
        """Prepares the E-step.

        Args:
            loop: what all iterations share.
            iteration: 1-based.
            policies: folders of the policies that sample.
        """
        self.loop, self.iteration, self.policies = loop, iteration, list(policies)
        self.paths = loop.run.iteration(iteration)
        earlier = [
            read_json(loop.run.iteration(number).manifest)["pool_iteration"]
            for number in range(1, iteration)
        ]
        self.num_pools_before = len(set(earlier))
        self.pool_iteration = earlier[-1] if loop.draw.reuse_pool else iteration

    @property
    def is_drawn_here(self) -> bool:
        """Whether this iteration has a pool of its own."""
        return self.pool_iteration == self.iteration

    def stores(self) -> list[CompletionStore]:
        """Returns the stores of the pool that is selected from."""
        drawn, hint = pool_stores(
            self.loop.run.iteration(self.pool_iteration).completions,
            num_policies=len(self.policies),
            has_hint=self.loop.hint is not None,
        )
        return [*drawn, *([hint] if hint else [])]

    def run(self, on_part: Callable[[], None]) -> None:
        """Writes accepted.parquet, then funnel.json; every rank must call it.

        Args:
            on_part: called after each part that this rank has written.
        """
        if self.is_drawn_here and (problems := self._problems()):
            self._choose_balance(problems, on_part)
            draw_pools(
                self.paths.completions,
                problems,
                policies=self.policies,
                stage_of=lambda policy: self.loop.stage(policy, self.iteration),
                hint=self.loop.hint,
                selection=self.loop.selection,
                engine=self.loop.engine,
                e_step=self.loop.e_step,
                show=f"E-step {self.iteration}",
                on_part=on_part,
            )
        barrier(self.loop.stop.is_leaving)
        on_part()
        if self.loop.scoring.scorer is not None:
            self.loop.scoring.scorer.close()
            release_memory()
        if is_rank_zero():
            self._select()
        barrier(self.loop.stop.is_leaving, written=self.paths.funnel)

    def metrics(self) -> dict[str, Any]:
        """Returns the E-step's part of metrics.json, from the pool and the funnel."""
        funnel, paths = read_json(self.paths.funnel), self.paths
        num_tokens, reasons = 0, Counter()
        for store in self.stores():
            for batch in store.iter_batches(["completion_ids", "finish_reason"]):
                num_tokens += len(batch["completion_ids"].flatten())
                reasons.update(batch["finish_reason"].to_pylist())
        seconds = read_json(paths.path / "seconds.json").get("e_step", 0.0)
        shared = any(is_shared(store) for store in self.stores())
        balance, parity = paths.path / "balance" / "balance.json", paths.path / "parity.json"
        return {
            "num_problems": funnel["num_problems"],
            "num_completions": funnel["completions"],
            "num_skipped": funnel["num_skipped"],
            "num_correct": funnel["correct"],
            "acceptance_rate": funnel["acceptance_rate"],
            "num_solved": funnel["num_solved"],
            "num_accepted": funnel["accepted"],
            "num_trained_on": funnel["trained_on"],
            "num_tokens": num_tokens,
            "seconds": seconds,
            "tokens_per_s": round(num_tokens / seconds, 1) if seconds and not shared else None,
            "shared": shared,
            "verdicts": funnel["verdicts"],
            "finish_reasons": dict(sorted(reasons.items())),
            "parity": read_json(parity) if parity.exists() else None,
            "balance": read_json(balance) if balance.exists() else None,
        }

    def _problems(self) -> list[Problem]:
        loop = self.loop
        return problems_of_e_step(
            loop.train, loop.draw.num_problems, e_step_index=self.num_pools_before, seed=loop.seed
        )

    def _choose_balance(self, problems: list[Problem], on_part: Callable[[], None]) -> None:
        """Replaces temperature and threshold of this iteration by those of the best balance."""
        loop = self.loop
        if not loop.balance.is_on():
            return
        policy = load_policy(self.policies[0], loop.engine)
        temperature, threshold = choose_balance(
            self.paths.path / "balance",
            problems,
            loop.stage(policy, self.iteration),
            loop.balance,
            threshold=loop.selection.threshold,
            e_step=loop.e_step,
            on_part=on_part,
        )
        del policy
        release_memory()
        self.loop = replace(
            loop,
            sampling=replace(loop.sampling, temperature=temperature),
            selection=replace(loop.selection, threshold=threshold),
        )

    def _select(self) -> None:
        loop, stores = self.loop, self.stores()
        for store in stores:
            store.verify_checksums()
        funnel: dict[str, Any] = {}
        mixed = self._mix(stream_accepted(stores, loop.selection, funnel))
        eos = eos_ids(loop.base, loop.template)
        num_mixed = write_accepted(self.paths.accepted, (end_with_eos(one, eos) for one in mixed))
        num_skipped = count_skipped(stores, loop.sampling.n)
        funnel |= {"num_skipped": num_skipped, "trained_on": num_mixed}
        print(
            f"iteration {self.iteration}: "
            + " -> ".join(f"{stage.replace('_', ' ')} {funnel[stage]}" for stage in STAGES)
            + f"; {funnel['num_solved']} of {funnel['num_problems']} problems solved"
            + (f"; {num_skipped} not drawn, the quota was met" if num_skipped else "")
            + (f"; {num_mixed} to train on" if num_mixed != funnel["accepted"] else "")
        )
        (self.paths.path / "parity.json").unlink(missing_ok=True)  # that of another pool
        write_json(self.paths.funnel, funnel)
        loop.tracker.catch_up()

    def _mix(self, accepted: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """Yields what the M-step trains on."""
        loop = self.loop

        def earlier() -> Iterator[pa.Table]:
            for number in range(1, self.iteration):
                yield from iter_accepted(loop.run.iteration(number).accepted)

        return mix(
            accepted,
            loop.mix,
            problems=loop.train,
            template=loop.template,
            tokenizer=AutoTokenizer.from_pretrained(loop.base),
            earlier=earlier(),
        )


def is_plateau(run: RunDir) -> bool:
    """Returns whether the last finished iteration's reward on D_val is no higher than before."""
    last = run.finished_iterations()[-2:]
    rewards = [read_json(run.iteration(number).metrics)["m_step"]["val_reward"] for number in last]
    return len(rewards) == 2 and rewards[1] <= rewards[0]
