"""LightningCLI for the loop: every setting, and the objects of an iteration."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins import TorchCheckpointIO

from restem_lightning.errors import UserError
from restem_lightning.loop.balance import BalanceParams
from restem_lightning.loop.draw import DrawParams
from restem_lightning.loop.e_step import EStepParams
from restem_lightning.loop.evaluate import EvaluationParams, ValidationParams
from restem_lightning.loop.learned import PreferenceParams
from restem_lightning.loop.mixing import MixParams
from restem_lightning.loop.tracking import TrackingParams
from restem_lightning.m_step.checkpoint_io import AtomicCheckpointIO
from restem_lightning.m_step.datamodule import AcceptedDataModule
from restem_lightning.m_step.module import PolicyModule
from restem_lightning.per_iteration import value_at, values_by_setting
from restem_lightning.problems import ProblemSource
from restem_lightning.prompts import PromptTemplate
from restem_lightning.scoring import ScoringParams
from restem_lightning.selection import SelectionParams
from restem_lightning.settings import add_policy_settings, quiet_libraries
from restem_lightning.unknown_options import likely_meant

DESCRIPTIONS = {
    "fit": "Runs ReST^EM; the same command resumes an unfinished run.",
    "plan": "Says what the run with these settings will take: tokens, time, memory, disk.",
}


@dataclass(frozen=True, kw_only=True)
class StopParams:
    """When an M-step ends. D_val is measured at every trainer.val_check_interval.

    Args:
        rule: first_drop stops when the reward on D_val no longer rises (the paper) and best runs to
            the end, both keep the best weights; none runs to the end and keeps the last.
        patience: with first_drop, the looks in a row without a rise that end the M-step.
        at_plateau: end the run after an iteration whose policy has no higher reward on D_val than
            the one before; `iterations` is then the most.
    """

    rule: str = "first_drop"
    patience: int = 1
    at_plateau: bool = False


class ReSTEMCLI(LightningCLI):
    """LightningCLI whose trainer, model and data are made anew for each iteration."""

    def add_arguments_to_parser(self, parser) -> None:
        """Adds what the loop needs beside trainer, model and data."""
        parser.add_argument("--run_dir", type=str, default="runs/restem", help="The run folder.")
        parser.add_argument(
            "--iterations", type=int, default=3, help="Rounds of E-step and M-step, at least 1."
        )
        parser.add_argument(
            "--start_from",
            type=str,
            default="base",
            help="Weights that each M-step starts from: base (the paper), previous, or a folder.",
        )
        parser.add_argument(
            "--carry_optimizer",
            type=bool,
            default=False,
            help="Whether an M-step goes on with the optimizer's state of the one before; for "
            "start_from previous and stop.rule none, without model.lora. The learning rate "
            "schedule begins anew.",
        )
        parser.add_argument(
            "--per_iteration",
            type=dict[str, Any],
            default={},
            help="Values of a setting in iterations 1, 2, ..., the last one holds on: {selection: "
            "{threshold: [0.0, 0.7, 0.8]}}; or growth: {trainer: {max_steps: {first: 40, times: "
            "1.2}}}, {first: 300, plus: 20}. A later config replaces all of it.",
        )
        _add_problems(parser)
        parser.add_argument(
            "--walltime_reserve_s",
            type=float,
            default=120.0,
            help="Seconds before the end of a SLURM allocation (SLURM_JOB_END_TIME) at which the "
            "run saves and stops; more than an optimizer step, a checkpoint and a look at D_val.",
        )
        add_policy_settings(parser)
        parser.add_argument(
            "--hint",
            type=PromptTemplate | None,
            default=None,
            help="Prompt of a second pass over the problems of which nothing acceptable was drawn, "
            "such as one that holds {reference_answer}; the M-step sees the usual prompt. Null for "
            "no such pass.",
        )
        parser.add_class_arguments(DrawParams, "draw")
        parser.add_class_arguments(BalanceParams, "balance")
        parser.add_class_arguments(ScoringParams, "scoring")
        parser.add_class_arguments(SelectionParams, "selection")
        parser.add_class_arguments(MixParams, "mix")
        parser.add_class_arguments(EStepParams, "e_step")
        parser.add_class_arguments(StopParams, "stop")
        parser.add_class_arguments(ValidationParams, "validation")
        parser.add_class_arguments(EvaluationParams, "evaluation")
        parser.add_class_arguments(PreferenceParams, "preference")
        parser.add_class_arguments(TrackingParams, "tracking")
        parser.link_arguments("policy", "model.policy")
        parser.link_arguments("seed_everything", "data.seed")

    def parse_arguments(self, parser, args) -> None:
        """Parses, and hands `problems.task` to the sources that wait for it."""
        with likely_meant(parser):
            super().parse_arguments(parser, args)
        if not 0 <= (seed := self.config.seed_everything) < 2**32:
            raise UserError(f"seed_everything ({seed}) must lie from 0 to {2**32 - 1}; change it")
        problems = self.config.problems
        for source in (problems.train, problems.validation, *problems.held_out.values()):
            made = source.init_args if source is not None and "init_args" in source else {}
            if "task" in made and made["task"] is None:
                made["task"] = problems.task

    def instantiate_classes(self) -> None:
        """Makes nothing yet: `iteration` does, each time anew (a fitted Trainer trains nothing)."""

    def settings(self) -> dict[str, Any]:
        """Returns all resolved settings but the run folder."""
        settings = json.loads(self.parser.dump(self.config, format="json", skip_none=False))
        settings["seed"] = settings.pop("seed_everything")
        del settings["run_dir"]
        return settings

    def build(self, iteration: int, *, start: str | None = None) -> Any:
        """Returns every configured object of an iteration, made anew.

        Args:
            iteration: 1-based.
            start: folder of the weights that the M-step starts from, if it is known yet.
        """
        config = self.config_of(iteration)
        if start is not None:  # not before: parsing links `policy` to it
            config.model.policy = start
        return self.parser.instantiate_classes(config)

    def config_of(self, iteration: int) -> Any:
        """Returns the configuration with the values that `per_iteration` has for an iteration.

        Raises:
            jsonargparse.ArgumentError: a value does not fit its setting.
        """
        by_setting = values_by_setting(self.config.per_iteration, self.config)
        if not by_setting:
            return self.config
        words = []
        for key, values in by_setting.items():
            value = value_at(values, iteration)
            words.append(f"--{key}={value if isinstance(value, str) else json.dumps(value)}")
        return self.parser.parse_args(words, namespace=self.config.clone())

    def make_trainer(self, made: Any, **changes: Any) -> Trainer:
        """Returns a new Trainer with the loop's callbacks behind the configured ones.

        Raises:
            UserError: Lightning takes no such trainer, or not where this runs.
        """
        self.config_init = made
        given = made.trainer.callbacks or []
        callbacks = [*(given if isinstance(given, list) else [given]), *changes.pop("callbacks")]
        try:
            trainer = self.instantiate_trainer(callbacks=callbacks, **changes)
        except (RuntimeError, TypeError, ValueError) as error:  # devices, SLURM's variables, ...
            raise UserError(f"trainer: {error}") from error
        if bar := trainer.progress_bar_callback:
            bar.get_metrics = partial(_shown_metrics, bar.get_metrics)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # no plugin of the user's
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer


def _shown_metrics(metrics: Callable[..., dict[str, Any]], *of: Any) -> dict[str, Any]:
    """Returns what a progress bar shows, without Lightning's count of CSV files of one M-step."""
    return {name: value for name, value in metrics(*of).items() if name != "v_num"}


def _add_problems(parser: Any) -> None:
    """Adds where the problems of each set are from."""
    parser.add_argument(
        "--problems.task",
        type=str | None,
        default=None,
        help="Task of every problem source that has a `task` and leaves it null.",
    )
    parser.add_argument(
        "--problems.train", type=ProblemSource, required=True, help="Problems of the E-step."
    )
    parser.add_argument(
        "--problems.validation",
        type=ProblemSource | None,
        default=None,
        help="D_val, whose reward ends an M-step; needed unless stop.rule is none.",
    )
    parser.add_argument(
        "--problems.held_out",
        type=dict[str, ProblemSource],
        default={},
        help="Evaluation sets by name; each iteration is measured on all of them.",
    )


def make_cli(
    words: list[str], kind: type[ReSTEMCLI] = ReSTEMCLI, *, verb: str = "fit"
) -> ReSTEMCLI:
    """Returns a parsed command line; no object is made and nothing runs.

    Args:
        words: the words after the verb.
        kind: class of the command line.
        verb: `fit`, or another that takes its options.

    Raises:
        jsonargparse.ArgumentError: for a setting that is unknown or of the wrong type.
    """
    quiet_libraries()
    return kind(
        PolicyModule,
        AcceptedDataModule,
        args=words,
        run=False,
        save_config_callback=None,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        seed_everything_default=0,
        parser_kwargs={
            "prog": f"restem {verb}",
            "usage": f"restem {verb} --config A.yaml [--config B.yaml ...] [--OPTION VALUE ...]",
            "description": DESCRIPTIONS[verb],
            "exit_on_error": False,
            "allow_abbrev": False,
        },
        trainer_defaults={
            "max_epochs": 4,
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
            "log_every_n_steps": 10,
        },
    )
