"""The iterations of ReST^EM, one Trainer.fit each, chained through the run folder."""

import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from restem_lightning.completion_store import CompletionStore
from restem_lightning.errors import UserError
from restem_lightning.fit.assembly import load_problems, make_loop
from restem_lightning.fit.checks import check_policies, check_settings, iterations_that_differ
from restem_lightning.fit.command_line import ReSTEMCLI, make_cli
from restem_lightning.loop.callback import ReSTEMCallback, remove_training_files
from restem_lightning.loop.iteration import is_plateau
from restem_lightning.loop.learned import learn_verifier, wants_verifier
from restem_lightning.loop.ranks import (
    LostRank,
    is_distributed,
    is_of_lost_rank,
    leave_together,
    roll_call,
)
from restem_lightning.loop.shared import Loop
from restem_lightning.loop.stop_request import LEFT_STATUS, Stopped, StopRequest
from restem_lightning.loop.stoppable import StoppableTraining
from restem_lightning.loop.tracking import Tracker
from restem_lightning.loop.weights import quick_collections
from restem_lightning.m_step.checkpoints import write_error
from restem_lightning.m_step.stopping import resume_checkpoint, stop_callbacks
from restem_lightning.problems import Problem
from restem_lightning.report.html import iteration_table, write_report
from restem_lightning.run_dir import RunDir, open_run
from restem_lightning.settings import (
    open_verifiers,
    resolve_policy,
)

# What may differ when a run is gone on with: it changes how far, where and how fast, not what.
FREE_ON_RESUME = (
    "iterations",
    "tracking",
    "verification",
    "walltime_reserve_s",
    "engine.cache_tokens",
    "e_step.parity_completions",
    "e_step.pool_cache",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.plugins",
    "trainer.strategy",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
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
    command = shlex.join(["restem", "fit", *words])
    with quick_collections(), _stopping(run, stop, command=command):
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
        if isinstance(error, Stopped):
            try:
                leave_together(stop.is_leaving)
            except LostRank as lost:  # behind its vote; of its launcher's SIGTERM this one stops
                _leave_alone(run, lost, command=command)
        if rank_zero_only.rank == 0:
            print(
                f"\nrestem fit: stopped by {stop.reason}; {_saved(run)}; go on with: {command}",
                file=sys.stderr,
            )
        is_ours = isinstance(error, Stopped) or rank_zero_only.rank == 0
        sys.exit(stop.status if is_ours else LEFT_STATUS)
    except BaseException as error:  # torch's error of a checkpoint is no Exception
        if is_of_lost_rank(error):
            _leave_alone(run, error, command=command)
        if reason := write_error(error):
            raise UserError(
                f"a checkpoint below {run.path} cannot be written ({reason}); free space or mend "
                "the permissions and give the same command again"
            ) from error
        raise
    finally:
        stop.uninstall()


def _leave_alone(run: RunDir, error: BaseException, *, command: str) -> None:
    """Ends this process where another rank has ended without a word."""
    teller, lost = roll_call()
    if rank_zero_only.rank == teller:
        reason = str(error).partition("\n")[0]
        what = f"{lost} was lost" if lost else f"ranks do not reach each other ({reason})"
        print(f"\nrestem fit: {what}; {_saved(run)}; go on with: {command}", file=sys.stderr)
    sys.exit(LEFT_STATUS)


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
    elif iteration > 1:
        before = run.iteration(iteration - 1)
        checkpoint = resume_checkpoint(before.verifier_training)
        if before.verifier.exists():
            saved.append(f"the verifier of iteration {iteration - 1}")
        elif checkpoint is not None:
            saved.append(f"the verifier of iteration {iteration - 1} up to {checkpoint.name}")
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
        problems = load_problems(made, verifiers)
        questions = {problem.problem_id: problem.question for problem in problems["train"]}
        with (
            _opened(run, settings),  # last: a mistake must not bind the folder to its settings
            Tracker(made.tracking, run, settings, base=base, questions=questions) as tracker,
        ):
            if rank_zero_only.rank == 0 and run.resume_iteration() <= config.iterations:
                print(_outline(config, made, problems))

            def loop_of(iteration: int) -> Loop:
                return make_loop(
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
    stop.is_patient = is_distributed()  # the others wait, and shall notice if rank 0 is lost
    if rank_zero_only.rank == 0:
        write_report([run.path], run.report)
        last = run.iteration(run.finished_iterations()[-1])
        print(f"\n{iteration_table(run.path)}\n\nreport  {run.report}\npolicy  {last.policy}")
    leave_together(stop.is_leaving)


@contextmanager
def _opened(run: RunDir, settings: dict[str, Any]) -> Iterator[None]:
    """Begins or resumes the run on rank 0, and keeps other processes out of its folder."""
    if rank_zero_only.rank != 0:
        yield
        return
    with run.held():
        open_run(run.path, settings, free=FREE_ON_RESUME)
        for iteration in run.finished_iterations():  # a kill may have come before it
            remove_training_files(run, iteration)
        yield


def _outline(config: Any, made: Any, problems: dict[str, list[Problem]]) -> str:
    """Returns what the run will do, in one line."""
    num_validation = len(problems.get("validation", []))
    num_held_out = sum(len(problems[name]) for name in made.problems.held_out)
    return (
        f"{config.iterations} iterations, {len(problems['train']):,} problems x {made.sampling.n} "
        f"completions each; {num_validation:,} problems in D_val, {num_held_out:,} held out; "
        "`restem plan` with the same words says what that takes"
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
        callbacks=[StoppableTraining(loop.stop, paths.m_step), callback, *stop],
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
        make_trainer=partial(cli.make_trainer, made),
    )
