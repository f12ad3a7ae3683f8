"""Where metrics go besides the run folder; the only file that knows W&B.

The run folder is the truth and W&B a mirror of it: every entry is journaled in tracking.jsonl first
and sent by a thread of its own, so a server that is slow or away costs the run nothing.
"""

import math
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from restem_lightning.completion_store import CompletionStore
from restem_lightning.errors import UserError
from restem_lightning.loop.journal import Entry, Journal, Mirror, say, warned
from restem_lightning.loop.redact import redact
from restem_lightning.m_step.export import policy_hash
from restem_lightning.run_dir import IterationDir, RunDir, read_json

TABLE_COLUMNS = (
    "problem_id", "completion_index", "verdict", "reward", "extracted", "finish_reason", "text",
    "detail",
)  # fmt: skip
MAX_TABLE_ROWS = 10_000  # of W&B itself
AXES = ("iteration", "samples_seen", "optimizer_step")
AXIS_OF = {
    "iteration/*": "iteration",
    "completions/*": "iteration",
    "e_step/*": "samples_seen",
    "budget/*": "samples_seen",
    "m_step/*": "optimizer_step",
}


@dataclass(frozen=True, kw_only=True)
class TrackingParams:
    """Where metrics are watched. The run folder always holds all of them (CSV and JSON).

    W&B's own variables (WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_TAGS, ...) hold where nothing is set.

    Args:
        wandb_project: W&B project; null for no W&B.
        wandb_mode: online, offline to write the run below the run folder for `wandb sync`, or null
            for what WANDB_MODE says: online (as if it says nothing), offline, or disabled.
        wandb_name: name of the run, null for W&B's choice.
        wandb_timeout_s: most seconds that a run waits for the server when it begins, and again when
            it ends; a server that does not answer makes it go on offline.
        table_rows: most rows of an iteration's table of completions, 0 to 10000; the first problems
            are shown, the same ones in each iteration.
        upload_policy: whether policies are uploaded; otherwise their artifacts only point to the
            run folder.
    """

    wandb_project: str | None = None
    wandb_mode: str | None = None
    wandb_name: str | None = None
    wandb_timeout_s: float = 30.0
    table_rows: int = 1000
    upload_policy: bool = True

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is not allowed.
        """
        if self.wandb_mode not in ("online", "offline", None):
            raise UserError(
                f"tracking.wandb_mode ({self.wandb_mode}) must be online, offline or null"
            )
        if self.wandb_timeout_s <= 0:
            raise UserError(f"tracking.wandb_timeout_s ({self.wandb_timeout_s}) must be above 0")
        if not 0 <= self.table_rows <= MAX_TABLE_ROWS:
            raise UserError(
                f"tracking.table_rows ({self.table_rows}) must lie from 0 to {MAX_TABLE_ROWS}"
            )


class Tracker:
    """One W&B run for the whole loop, over every iteration, restart and requeue; or none."""

    def __init__(
        self,
        params: TrackingParams,
        run: RunDir,
        settings: dict[str, Any],
        *,
        base: str,
        questions: dict[str, str] | None = None,
    ):
        """Opens the W&B run that run.json names, or a new one, on rank 0, and sends what it lacks.

        Args:
            params: whether and where.
            run: the run folder.
            settings: resolved settings, shown as the run's config without their secrets.
            base: folder of the base model.
            questions: text by problem_id, for the tables of completions.

        Raises:
            UserError: if W&B is wanted and not installed.
        """
        self.run, self._params, self._base = run, params, base
        self._questions, self._mirror = questions or {}, None
        is_off = params.wandb_mode is None and os.environ.get("WANDB_MODE") == "disabled"
        if params.wandb_project is None or is_off or rank_zero_only.rank != 0:
            return
        self._wandb = _import_wandb()
        self._journal = Journal(run.path / "tracking.jsonl")
        self._wandb_run, is_offline = _open_wandb(self._wandb, params, run, redact(settings))
        for axis in AXES:
            self._wandb_run.define_metric(axis, hidden=axis != "iteration")
        for names, axis in AXIS_OF.items():
            self._wandb_run.define_metric(names, step_metric=axis)
        # An offline folder is always the whole run; a server says how far it has come.
        known = 0 if is_offline else self._wandb_run.step
        self._mirror = Mirror(self._send, self._journal.entries[known:])
        self.catch_up()

    def m_step_loggers(self, iteration: int) -> list[Logger]:
        """Returns the loggers of one M-step: a CSV file in its folder, and W&B if there is one."""
        loggers: list[Logger] = [CSVLogger(self.run.iteration(iteration).m_step, name="log")]
        if self._mirror is not None:
            loggers.append(_MStepRows(self, iteration))
        return loggers

    def catch_up(self) -> None:
        """Sends what the run folder holds and was not sent yet; called when a stage has ended."""
        if self._mirror is None:
            return
        self._put("base/0", {})
        for iteration in self.run.iterations():
            paths, axes = self.run.iteration(iteration), self.axes(iteration)
            if paths.funnel.exists():
                self._put(f"e_step/{iteration}", axes | _named("e_step", read_json(paths.funnel)))
                if self._params.table_rows and paths.completions.exists():
                    self._put(f"completions/{iteration}", axes)
                self._put(f"accepted/{iteration}", {})
            if paths.manifest.exists() or (iteration == 0 and paths.metrics.exists()):
                self._put(f"iteration/{iteration}", axes | _iteration_row(read_json(paths.metrics)))
            if paths.manifest.exists():
                self._put(f"policy/{iteration}", {})
            if paths.verifier_json.exists():
                rates = {"evaluation": read_json(paths.verifier_json)["evaluation"]}
                self._put(f"verifier/{iteration}", axes | _iteration_row(rates))

    def axes(self, iteration: int, m_step: int | None = None) -> dict[str, float]:
        """Returns where a row stands: in the loop, in completions drawn, in optimizer steps.

        Args:
            iteration: the row's.
            m_step: optimizer steps of this iteration's M-step so far; None for all of them.
        """
        samples = steps = 0
        for one in (self.run.iteration(i) for i in range(1, iteration + 1)):
            if one.funnel.exists() and one.completions.exists():  # not a pool of before
                samples += read_json(one.funnel)["completions"]
            is_now = one.path == self.run.iteration(iteration).path
            if m_step is not None and is_now:
                steps += m_step
            elif one.manifest.exists():
                steps += read_json(one.metrics)["m_step"]["optimizer_steps"]
        return {"iteration": iteration, "samples_seen": samples, "optimizer_step": steps}

    def put_m_step(self, axes: dict[str, float], metrics: dict[str, float]) -> None:
        """Sends a row of an M-step, unless a resumed one only repeats it."""
        assert self._mirror is not None
        step = axes["optimizer_step"]
        rows = (e for e in reversed(self._journal.entries) if e.key.startswith("m_step/"))
        last = next(rows, None)
        if last is None or step >= last.values["optimizer_step"]:
            names = "+".join(sorted(metrics))
            self._put(f"m_step/{step}/{names}", axes | _named("m_step", metrics))

    def __enter__(self) -> "Tracker":
        """Returns the tracker itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Ends the W&B run's process, within the timeout; the run can be gone on with."""
        if self._mirror is not None:
            self._mirror.close(self._params.wandb_timeout_s)
            with warned("closing the run"):
                self._wandb_run.finish(exit_code=int(kind is not None))
            # Offline, `finish` of 0.31 returns before all is on disk. Where SIGTERM has ended W&B's
            # process too (SLURM sends it to all), this keeps a stack trace from the end of ours.
            with suppress(OSError):
                self._wandb.teardown()

    def _put(self, key: str, values: dict[str, float]) -> None:
        """Journals an entry and hands it to the thread; an entry that is journaled stays out."""
        if key not in self._journal:
            self._mirror.put(self._journal.append(key, values))

    def _send(self, entry: Entry) -> None:
        """Sends one entry; the thread calls it."""
        kind, _, rest = entry.key.partition("/")
        if kind in ("base", "accepted", "policy"):
            self._send_artifact(kind, int(rest))
            return
        values: dict[str, Any] = dict(entry.values)
        if kind == "completions":
            values[f"completions/iteration_{rest}"] = self._table(int(rest))
        self._wandb_run.log({**values, "_timestamp": entry.time}, step=entry.step)

    def _table(self, iteration: int) -> Any:
        """Returns the first completions of an E-step as a W&B table of its own."""
        store = CompletionStore(self.run.iteration(iteration).completions)
        rows: list[dict[str, Any]] = []
        for batch in store.iter_batches(TABLE_COLUMNS):
            rows += batch.slice(0, self._params.table_rows - len(rows)).to_pylist()
            if len(rows) == self._params.table_rows:
                break
        data = [
            [iteration, self._questions.get(row["problem_id"], ""), *row.values()] for row in rows
        ]
        return self._wandb.Table(columns=["iteration", "question", *TABLE_COLUMNS], data=data)

    def _send_artifact(self, kind: str, iteration: int) -> None:
        """Logs a policy or an accepted dataset, and marks as used what the run goes on from.

        The lineage that W&B draws is base-policy -> run -> accepted -> run -> policy; the hashes in
        their metadata say which policy drew which dataset.
        """
        paths, run_id = self.run.iteration(iteration), self._wandb_run.id
        if kind == "base":
            metadata = {"folder": self._base, "policy_hash": policy_hash(self._base)}
            artifact = self._wandb.Artifact("base-policy", "model", metadata=metadata)
            artifact.add_reference(Path(self._base).resolve().as_uri(), checksum=False)
        elif kind == "accepted":
            pools = sorted(paths.completions.rglob("pool.json"))
            drawn_by = [read_json(pool)["settings"]["policy_hash"] for pool in pools]
            metadata = {"iteration": iteration, "drawn_by": drawn_by, **read_json(paths.funnel)}
            artifact = self._wandb.Artifact(f"accepted-{run_id}", "dataset", metadata=metadata)
            _add_files(artifact, [paths.accepted], paths.path)
        else:
            artifact = self._policy_artifact(paths)
        # `use_artifact` of 0.31 waits for the server without limit and refuses offline runs; this
        # is what it calls. Offline, files are read where they are by `wandb sync`.
        self._wandb_run._log_artifact(
            artifact,
            aliases=["latest", f"iteration_{iteration}"],
            use_after_commit=kind != "policy",
        )

    def _policy_artifact(self, paths: IterationDir) -> Any:
        """Returns the artifact of an iteration's policy folder, however many files it has."""
        manifest, run_id = read_json(paths.manifest), self._wandb_run.id
        metadata = {**manifest, "accepted": f"accepted-{run_id}:iteration_{manifest['iteration']}"}
        artifact = self._wandb.Artifact(f"policy-{run_id}", "model", metadata=metadata)
        if self._params.upload_policy:
            files = sorted(path for path in paths.policy.rglob("*") if path.is_file())
            _add_files(artifact, files, paths.policy)
        else:
            artifact.add_reference(paths.policy.resolve().as_uri(), checksum=False)
        return artifact


class _MStepRows(Logger):
    """Lightning's logger interface onto the loop's W&B run; Lightning's own has another axis."""

    def __init__(self, tracker: Tracker, iteration: int):
        super().__init__()
        self._tracker, self._iteration = tracker, iteration

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> int:
        return self._iteration

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The run's config already holds all settings."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._tracker.put_m_step(self._tracker.axes(self._iteration, m_step=step or 0), metrics)


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError(
            "tracking.wandb_project needs `pip install restem-lightning[wandb]`; or set it to null"
        ) from None
    return wandb


def _open_wandb(
    wandb: Any, params: TrackingParams, run: RunDir, config: dict[str, Any]
) -> tuple[Any, bool]:
    """Returns the loop's W&B run, and whether it is offline: asked for, or for want of a server."""
    run_id = read_json(run.run_json)["wandb_run_id"]
    if run_id is None:  # written before W&B hears of it: a kill between must not make two runs
        run_id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        run.update_run(wandb_run_id=run_id)
    seconds = params.wandb_timeout_s

    def begin(mode: str | None) -> Any:
        with _bare_command_line():
            return wandb.init(
                project=params.wandb_project,
                name=params.wandb_name,
                mode=mode,
                id=run_id,
                resume="allow",
                dir=run.path,
                config=config,
                settings=wandb.Settings(
                    init_timeout=seconds, login_timeout=seconds, finish_timeout=seconds, silent=True
                ),
            )

    try:
        wandb_run = begin(params.wandb_mode)
    except (wandb.Error, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        say(f"W&B does not take this run ({reason}); it goes on offline")
        wandb.teardown()  # its process still holds the run's id
        wandb_run = begin("offline")
    is_offline = bool(wandb_run.settings._offline)
    if is_offline:
        folder = Path(wandb_run.settings.sync_dir)
        say(f"W&B is offline; `wandb sync {folder}` sends the whole run so far")
    else:
        say(f"W&B run {wandb_run.url}")
    return wandb_run, is_offline


@contextmanager
def _bare_command_line() -> Iterator[None]:
    """Hides the command line's words, which may hold secrets, from W&B; its config has them all."""
    words, sys.argv = sys.argv, sys.argv[:1]
    try:
        yield
    finally:
        sys.argv = words


def _add_files(artifact: Any, files: list[Path], folder: Path) -> None:
    """Adds files of the run folder, which never change again, without a copy elsewhere."""
    for path in files:
        artifact.add_file(
            str(path), name=str(path.relative_to(folder)), policy="immutable", skip_cache=True
        )


def _iteration_row(metrics: dict[str, Any]) -> dict[str, float]:
    """Returns metrics under iteration/, and their rates under budget/ for the other axis."""
    rates = {
        f"{name}/{key}": one["value"]
        for name, values in metrics["evaluation"].items()
        for key, one in values.items()
    }
    return _named("iteration", metrics) | _named("budget", rates)


def _named(prefix: str, value: Any) -> dict[str, float]:
    """Returns prefix/path -> number; what is no finite number is left out."""
    if isinstance(value, dict):
        flat: dict[str, float] = {}
        for key, item in value.items():
            flat.update(_named(f"{prefix}/{key}", item))
        return flat
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    return {prefix: value} if is_number else {}
