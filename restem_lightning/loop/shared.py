"""What all iterations of a run share."""

from dataclasses import dataclass

from restem_lightning.loop.balance import BalanceParams
from restem_lightning.loop.draw import DrawParams
from restem_lightning.loop.e_step import EStepParams
from restem_lightning.loop.evaluate import EvaluationParams
from restem_lightning.loop.mixing import MixParams
from restem_lightning.loop.stage import Policy, Stage
from restem_lightning.loop.stop_request import StopRequest
from restem_lightning.loop.tracking import Tracker
from restem_lightning.problems import Problem
from restem_lightning.prompts import PromptTemplate
from restem_lightning.run_dir import RunDir
from restem_lightning.sampler import EngineParams, SamplingParams
from restem_lightning.scoring import ScoringParams
from restem_lightning.selection import SelectionParams
from restem_lightning.verifiers import VerifierPool


@dataclass(frozen=True, kw_only=True)
class Loop:
    """What all iterations of a run share, and the settings of the one at hand.

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
        draw: what the E-step draws from whom.
        hint: prompt of a second pass over unsolved problems, None for no such pass.
        balance: choice of temperature and threshold.
        e_step: size of parts, alarm, quota, parity.
        scoring: a learned verifier in the E-step.
        selection: which completions are accepted.
        mix: what the M-step trains on beside them.
        carry_optimizer: whether the M-step goes on with the optimizer's state of the one before.
        evaluation: how policies are measured.
        tracker: sends metrics to where they are watched.
        stop: whether the run shall stop; asked where nothing is lost.
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
    draw: DrawParams
    hint: PromptTemplate | None
    balance: BalanceParams
    e_step: EStepParams
    scoring: ScoringParams
    selection: SelectionParams
    mix: MixParams
    carry_optimizer: bool
    evaluation: EvaluationParams
    tracker: Tracker
    stop: StopRequest

    def stage(self, policy: Policy, iteration: int) -> Stage:
        """Returns how a policy draws in an iteration, with the settings of the E-step."""
        return Stage(
            policy=policy,
            template=self.template,
            verifiers=self.verifiers,
            params=self.sampling,
            seed=self.seed,
            iteration=iteration,
            scoring=self.scoring,
            should_stop=self.stop.is_asked,
            is_leaving=self.stop.is_leaving,
        )
