"""`restem fit`: the iterations of ReST^EM, one Trainer.fit each, chained through the run folder."""

import json
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from restem_lightning.completions import CompletionStore
from restem_lightning.errors import UserError
from restem_lightning.fit_checks import check_policies, check_settings, iterations_that_differ
from restem_lightning.loop.balance import BalanceParams
from restem_lightning.loop.callback import ReSTEMCallback
from restem_lightning.loop.draw import DrawParams
from restem_lightning.loop.e_step import EStepParams, prepare_problems
from restem_lightning.loop.evaluate import EvaluationParams, ValidationParams
from restem_lightning.loop.iteration import is_plateau
from restem_lightning.loop.learned import PreferenceParams, learn_verifier, wants_verifier
from restem_lightning.loop.mixing import MixParams
from restem_lightning.loop.ranks import leave_together
from restem_lightning.loop.shared import Loop
from restem_lightning.loop.stop_request import Stopped, StopRequest
from restem_lightning.loop.tracking import Tracker, TrackingParams
from restem_lightning.m_step.datamodule import AcceptedDataModule
from restem_lightning.m_step.module import PolicyModule
from restem_lightning.m_step.stopping import resume_checkpoint, stop_callbacks
from restem_lightning.per_iteration import value_at, values_by_setting
from restem_lightning.problems import Problem, ProblemSource, check_splits, without_questions_of
from restem_lightning.prompts import PromptTemplate
from restem_lightning.report.html import iteration_table, write_report
from restem_lightning.run_dir import RunDir, open_run
from restem_lightning.scoring import ScoringParams
from restem_lightning.selection import SelectionParams
from restem_lightning.settings import (
    add_policy_settings,
    open_verifiers,
    quiet_libraries,
    resolve_policy,
)
from restem_lightning.verifiers import VerifierPool

# What may differ when a run is gone on with: it changes how far, where and how fast, not what.
FREE_ON_RESUME = (
    "iterations",
    "tracking",
    "verification",
    "walltime_reserve_s",
    "engine.cache_tokens",
    "e_step.parity_completions",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.plugins",
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
            "start_from previous and stop.rule none. The learning rate schedule begins anew.",
        )
        parser.add_argument(
            "--per_iteration",
            type=dict[str, Any],
            default={},
            help="Values of a setting in iterations 1, 2, ..., the last one holds on: {selection: "
            "{threshold: [0.0, 0.7, 0.8]}}; or growth: {trainer: {max_steps: {first: 40, times: "
            "1.2}}}, {first: 300, plus: 20}. A later config replaces all of it.",
        )
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
        super().parse_arguments(parser, args)
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
        """Returns a new Trainer with the loop's callbacks behind the configured ones."""
        self.config_init = made
        callbacks = [*(made.trainer.callbacks or []), *changes.pop("callbacks")]
        return self.instantiate_trainer(callbacks=callbacks, **changes)


def make_cli(words: list[str]) -> ReSTEMCLI:
    """Returns the parsed command line of `restem fit`; no object is made and nothing runs.

    Args:
        words: the words after `restem fit`.

    Raises:
        jsonargparse.ArgumentError: for a setting that is unknown or of the wrong type.
    """
    quiet_libraries()
    return ReSTEMCLI(
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


def fit(words: list[str]) -> None:
    """Runs or resumes a run.

    Args:
        words: the words after `restem fit`.

    Raises:
        UserError: for a user's mistake.
    """
    cli = make_cli(words)
    run = RunDir(cli.config.run_dir)
    stop = StopRequest(reserve_s=cli.config.walltime_reserve_s)
    with _stopping(run, stop, command=shlex.join(["restem", "fit", *words])):
        try:
            _run(cli, run, stop)
        except MisconfigurationException as error:
            raise UserError(f"trainer: {error}") from error


@contextmanager
def _stopping(run: RunDir, stop: StopRequest, *, command: str) -> Iterator[None]:
    """Ends a stopped process with a line that says what is saved."""
    stop.install()
    try:
        yield
    except (Stopped, KeyboardInterrupt, SystemExit) as error:  # Lightning exits at an interrupt
        if stop.signum is None and not isinstance(error, Stopped):
            raise
        if rank_zero_only.rank == 0:
            print(
                f"\nrestem fit: stopped by {stop.reason}; {_saved(run)}; go on with: {command}",
                file=sys.stderr,
            )
        if isinstance(error, Stopped):
            leave_together()
        sys.exit(stop.status)
    finally:
        stop.uninstall()


def _saved(run: RunDir) -> str:
    """Returns what a resumed run will not do again."""
    iteration = run.resume_iteration()
    paths = run.iteration(iteration)
    checkpoint = resume_checkpoint(paths.m_step)
    parts = len(CompletionStore(paths.completions).parts())
    saved = [f"{iteration - 1} finished iterations"]
    if paths.policy.exists():
        saved.append(f"the policy of iteration {iteration}")
    elif checkpoint is not None:
        saved.append(f"the M-step of iteration {iteration} up to {checkpoint.name}")
    elif paths.funnel.exists():
        saved.append(f"the E-step of iteration {iteration}")
    elif parts:
        saved.append(f"{parts} parts of the E-step of iteration {iteration}")
    return f"{run.path} keeps {' and '.join(saved)}"


def _run(cli: ReSTEMCLI, run: RunDir, stop: StopRequest) -> None:
    config = cli.config
    made = cli.build(1)
    base = resolve_policy(config.policy)
    for iteration in iterations_that_differ(config):
        check_settings(cli.config_of(iteration), cli.build(iteration), run, iteration)
        check_policies(cli.config_of(iteration), base)
    settings = cli.settings()
    with open_verifiers(config.verifier, made.verification) as verifiers:
        problems = _load_problems(made, verifiers)
        if rank_zero_only.rank == 0:  # last: a mistake must not bind the folder to its settings
            open_run(run.path, settings, free=FREE_ON_RESUME)
        questions = {problem.problem_id: problem.question for problem in problems["train"]}
        with Tracker(made.tracking, run, settings, base=base, questions=questions) as tracker:

            def loop_of(iteration: int) -> Loop:
                return _make_loop(
                    cli.build(iteration), problems, run=run, base=base, seed=settings["seed"],
                    verifiers=verifiers, tracker=tracker, stop=stop,
                )  # fmt: skip

            for iteration in range(1, config.iterations + 1):
                is_finished = iteration < run.resume_iteration()
                if not is_finished and config.stop.at_plateau and is_plateau(run):
                    break
                if not is_finished:
                    _fit_iteration(cli, loop_of(iteration), iteration)
                if wants_verifier(made.preference, run, iteration, is_last=False):
                    _learn_verifier(cli, loop_of(iteration), iteration)
            last = run.finished_iterations()[-1]
            if wants_verifier(made.preference, run, last, is_last=True):
                _learn_verifier(cli, loop_of(last), last)
    stop.is_patient = False
    if rank_zero_only.rank == 0:
        write_report([run.path], run.report)
        last = run.iteration(run.finished_iterations()[-1])
        print(f"\n{iteration_table(run.path)}\n\nreport  {run.report}\npolicy  {last.policy}")
    leave_together()


def _load_problems(made: Any, verifiers: VerifierPool) -> dict[str, list[Problem]]:
    """Returns the checked problems: train, validation, and each held-out set by its name."""
    sources = {"train": made.problems.train, **made.problems.held_out}
    if made.problems.validation is not None:
        sources["validation"] = made.problems.validation
    problems = {name: source.load() for name, source in sources.items()}
    check_splits(problems)
    others = [problem for name in made.problems.held_out for problem in problems[name]]
    for name in ("validation", "train"):
        if name in problems:
            problems[name] = _apart(name, problems[name], others)
            others += problems[name]
    return {
        name: prepare_problems(some, verifiers, name=name, warn=_say)
        for name, some in problems.items()
    }


def _apart(name: str, problems: list[Problem], others: list[Problem]) -> list[Problem]:
    """Returns the problems that no set they must be unknown to asks as well."""
    kept, dropped = without_questions_of(problems, others)
    if dropped:
        _say(
            f"problems.{name}: {len(dropped)} of {len(problems)} are dropped, a set that measures "
            f"asks the same ({dropped[0].problem_id})"
        )
    return kept


def _make_loop(
    made: Any,
    problems: dict[str, list[Problem]],
    *,
    run: RunDir,
    base: str,
    seed: int,
    verifiers: VerifierPool,
    tracker: Tracker,
    stop: StopRequest,
) -> Loop:
    """Puts together what the iterations share."""
    return Loop(
        run=run,
        base=base,
        seed=seed,
        train=problems["train"],
        validation=problems.get("validation", []),
        held_out={name: problems[name] for name in made.problems.held_out},
        template=made.prompt,
        verifiers=verifiers,
        sampling=made.sampling,
        validation_sampling=replace(made.sampling, **asdict(made.validation), min_p=0.0),
        engine=made.engine,
        draw=made.draw,
        hint=made.hint,
        balance=made.balance,
        e_step=made.e_step,
        scoring=made.scoring,
        selection=made.selection,
        mix=made.mix,
        carry_optimizer=made.carry_optimizer,
        evaluation=made.evaluation,
        tracker=tracker,
        stop=stop,
    )


def _fit_iteration(cli: ReSTEMCLI, loop: Loop, iteration: int) -> None:
    """One E-step and one M-step, in new objects throughout."""
    paths = loop.run.iteration(iteration)
    previous = loop.base if iteration == 1 else str(loop.run.iteration(iteration - 1).policy)
    known = {"base": loop.base, "previous": previous}
    start_from = cli.config_of(iteration).start_from
    start = resolve_policy(known.get(start_from, start_from))
    made = cli.build(iteration, start=start)
    stop = stop_callbacks(made.stop.rule, patience=made.stop.patience, folder=paths.m_step)
    callback = ReSTEMCallback(
        loop,
        iteration,
        policies=[resolve_policy(known.get(name, name)) for name in loop.draw.names()],
        trained_from=start,
    )
    trainer = cli.make_trainer(
        made,
        callbacks=[callback, *stop],
        logger=loop.tracker.m_step_loggers(iteration),
        default_root_dir=str(paths.m_step),
    )
    loop.stop.is_patient = True  # ranks are connected now: only together can they stop
    trainer.fit(made.model, made.data, ckpt_path=resume_checkpoint(paths.m_step))


def _learn_verifier(cli: ReSTEMCLI, loop: Loop, iteration: int) -> None:
    """Trains the verifier of a finished iteration, in new objects throughout."""
    params = cli.build(iteration).preference
    start = {"base": loop.base}.get(params.start_from, params.start_from)
    if re.fullmatch(r"iteration_\d+", start):
        start = str(loop.run.path / start / "policy")
    made = cli.build(iteration)
    learn_verifier(
        loop,
        iteration,
        params,
        start=resolve_policy(start),
        make_trainer=lambda **changes: cli.make_trainer(made, callbacks=[], **changes),
    )


@rank_zero_only
def _say(text: str) -> None:
    print(f"restem fit: {text}", file=sys.stderr)
