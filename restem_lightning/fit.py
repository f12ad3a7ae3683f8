"""`restem fit`: the iterations of ReST^EM, one Trainer.fit each, chained through the run folder."""

import json
import logging
import shlex
import sys
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from restem_lightning.errors import UserError
from restem_lightning.loop.callback import Loop, ReSTEMCallback
from restem_lightning.loop.e_step import EStepParams, prepare_problems
from restem_lightning.loop.evaluate import EvaluationParams
from restem_lightning.loop.tracking import Tracker, TrackingParams
from restem_lightning.m_step.datamodule import AcceptedDataModule
from restem_lightning.m_step.module import PolicyModule
from restem_lightning.m_step.stopping import resume_checkpoint, stop_callbacks
from restem_lightning.problems import ProblemSource, check_splits
from restem_lightning.report.html import iteration_table, write_report
from restem_lightning.run_dir import RunDir, open_run
from restem_lightning.selection import SelectionParams
from restem_lightning.settings import (
    add_policy_settings,
    open_verifiers,
    resolve_policy,
)

# What may differ when a run is gone on with: it changes how far, where and how fast, not what.
FREE_ON_RESUME = (
    "iterations",
    "tracking",
    "verification",
    "engine.max_batch_tokens",
    "engine.cache_tokens",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
)


@dataclass(frozen=True, kw_only=True)
class StopParams:
    """When an M-step ends. D_val is measured at every trainer.val_check_interval.

    Args:
        rule: first_drop stops when the reward on D_val no longer rises (the paper) and best runs to
            the end, both keep the best weights; none runs to the end and keeps the last.
        patience: with first_drop, the looks in a row without a rise that end the M-step.
    """

    rule: str = "first_drop"
    patience: int = 1


@dataclass(frozen=True, kw_only=True)
class ValidationParams:
    """How D_val is sampled inside the M-step; max_new_tokens and stop are those of the E-step.

    Args:
        n: completions per problem; the mean reward counts.
        temperature: 0 for greedy.
        top_k: 0 for all.
        top_p: 1 for all.
    """

    n: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


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
        add_policy_settings(parser)
        parser.add_class_arguments(SelectionParams, "selection")
        parser.add_class_arguments(EStepParams, "e_step")
        parser.add_class_arguments(StopParams, "stop")
        parser.add_class_arguments(ValidationParams, "validation")
        parser.add_class_arguments(EvaluationParams, "evaluation")
        parser.add_class_arguments(TrackingParams, "tracking")
        parser.link_arguments("policy", "model.policy")
        parser.link_arguments("seed_everything", "data.seed")

    def instantiate_classes(self) -> None:
        """Makes nothing yet: `iteration` does, each time anew (a fitted Trainer trains nothing)."""

    def settings(self) -> dict[str, Any]:
        """Returns all resolved settings but the run folder."""
        settings = json.loads(self.parser.dump(self.config, format="json", skip_none=False))
        settings["seed"] = settings.pop("seed_everything")
        del settings["run_dir"]
        return settings

    def build(self) -> Any:
        """Returns every configured object, made anew."""
        return self.parser.instantiate_classes(self.config)

    def make_trainer(self, made: Any, **changes: Any) -> Trainer:
        """Returns a new Trainer with the loop's callbacks behind the configured ones."""
        self.config_init = made
        callbacks = [*(made.trainer.callbacks or []), *changes.pop("callbacks")]
        return self.instantiate_trainer(callbacks=callbacks, **changes)


def fit(words: list[str]) -> None:
    """Runs or resumes a run.

    Args:
        words: the words after `restem fit`.

    Raises:
        UserError: for a user's mistake.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):  # their import sets the level anew
        logging.getLogger(name).setLevel(logging.WARNING)
    cli = ReSTEMCLI(
        PolicyModule,
        AcceptedDataModule,
        args=words,
        run=False,
        save_config_callback=None,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        seed_everything_default=0,
        parser_kwargs={
            "prog": "restem fit",
            "description": "Runs ReST^EM; the same command resumes an unfinished run.",
            "exit_on_error": False,
        },
        trainer_defaults={
            "max_epochs": 4,
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
            "log_every_n_steps": 10,
        },
    )
    run = RunDir(cli.config.run_dir)
    try:
        _run(cli, run)
    except (KeyboardInterrupt, SystemExit) as stop:  # Lightning turns Ctrl-C into SystemExit(1)
        if isinstance(stop, KeyboardInterrupt) or stop.code == 1:
            command = shlex.join(["restem", "fit", *words])
            print(
                f"\nrestem fit: stopped; what is finished is in {run.path}. Go on with: {command}",
                file=sys.stderr,
            )
            sys.exit(130)
        raise


def _run(cli: ReSTEMCLI, run: RunDir) -> None:
    config = cli.config
    if config.iterations < 1:
        raise UserError(f"iterations ({config.iterations}) must be at least 1")
    made = cli.build()
    if (
        made.selection.max_per_problem is not None
        and made.selection.max_per_problem > made.sampling.n
    ):
        raise UserError(
            f"selection.max_per_problem ({made.selection.max_per_problem}) must be at most "
            f"sampling.n ({made.sampling.n}); lower it or draw more"
        )
    base = resolve_policy(config.policy)
    stop_callbacks(made.stop.rule, patience=made.stop.patience, folder=run.path)  # checks both
    if made.problems.validation is None and made.stop.rule != "none":
        raise UserError(
            f"stop.rule ({made.stop.rule}) needs problems.validation; give it, or set stop.rule to none"
        )
    settings = cli.settings()
    if rank_zero_only.rank == 0:
        open_run(run.path, settings, free=FREE_ON_RESUME)
    with open_verifiers(config.verifier, made.verification) as verifiers:
        loop = _make_loop(made, run, base, verifiers, settings)
        for iteration in range(run.resume_iteration(), config.iterations + 1):
            _fit_iteration(cli, loop, iteration)
        loop.tracker.close()
    if rank_zero_only.rank == 0:
        write_report([run.path], run.report)
        last = run.iteration(config.iterations)
        print(f"\n{iteration_table(run.path)}\n\nreport  {run.report}\npolicy  {last.policy}")


def _make_loop(made: Any, run: RunDir, base: str, verifiers, settings: dict[str, Any]) -> Loop:
    """Loads and checks the problems and puts together what the iterations share."""
    sources = {"train": made.problems.train, **made.problems.held_out}
    if made.problems.validation is not None:
        sources["validation"] = made.problems.validation
    if len(sources) < 1 + len(made.problems.held_out) + (made.problems.validation is not None):
        raise UserError("problems.held_out must not name a set `train` or `validation`")
    problems = {name: source.load() for name, source in sources.items()}
    check_splits(problems)
    problems = {
        name: prepare_problems(some, verifiers, name=name, warn=_say)
        for name, some in problems.items()
    }
    return Loop(
        run=run,
        base=base,
        seed=settings["seed"],
        train=problems["train"],
        validation=problems.get("validation", []),
        held_out={name: problems[name] for name in made.problems.held_out},
        template=made.prompt,
        verifiers=verifiers,
        sampling=made.sampling,
        validation_sampling=replace(
            made.sampling,
            n=made.validation.n,
            temperature=made.validation.temperature,
            top_k=made.validation.top_k,
            top_p=made.validation.top_p,
            min_p=0.0,
        ),
        engine=made.engine,
        e_step=made.e_step,
        selection=made.selection,
        evaluation=made.evaluation,
        tracker=Tracker(made.tracking, run, settings),
    )


def _fit_iteration(cli: ReSTEMCLI, loop: Loop, iteration: int) -> None:
    """One E-step and one M-step, in new objects throughout."""
    paths = loop.run.iteration(iteration)
    previous = loop.base if iteration == 1 else str(loop.run.iteration(iteration - 1).policy)
    start = {"base": loop.base, "previous": previous}.get(
        cli.config.start_from, cli.config.start_from
    )
    cli.config.model.policy = resolve_policy(start)
    made = cli.build()
    stop = stop_callbacks(made.stop.rule, patience=made.stop.patience, folder=paths.m_step)
    callback = ReSTEMCallback(
        loop, iteration, sampler_policy=previous, trained_from=cli.config.model.policy
    )
    trainer = cli.make_trainer(
        made,
        callbacks=[callback, *stop],
        logger=loop.tracker.m_step_logger(paths.m_step),
        default_root_dir=str(paths.m_step),
    )
    trainer.fit(made.model, made.data, ckpt_path=resume_checkpoint(paths.m_step))


@rank_zero_only
def _say(text: str) -> None:
    print(f"restem fit: {text}", file=sys.stderr)
