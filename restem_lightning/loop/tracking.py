"""Where metrics go besides the run folder; the only file that knows W&B."""

from dataclasses import dataclass
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from restem_lightning.completions import CompletionStore
from restem_lightning.errors import UserError
from restem_lightning.run_dir import RunDir, read_json

TABLE_COLUMNS = (
    "problem_id", "completion_index", "verdict", "extracted", "finish_reason", "text", "detail",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrackingParams:
    """Where metrics are watched. The run folder always holds all of them (CSV and JSON).

    Args:
        wandb_project: W&B project; null for no W&B.
        wandb_mode: online, or offline to write the run below the run folder for `wandb sync`.
        wandb_name: name of the run, null for W&B's choice.
    """

    wandb_project: str | None = None
    wandb_mode: str = "online"
    wandb_name: str | None = None

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is not allowed.
        """
        if self.wandb_mode not in ("online", "offline"):
            raise UserError(f"tracking.wandb_mode ({self.wandb_mode}) must be online or offline")


class Tracker:
    """One W&B run for the whole loop, over every iteration and restart; or none."""

    def __init__(self, params: TrackingParams, run: RunDir, settings: dict[str, Any]):
        """Opens the W&B run that run.json names, or a new one, on rank 0.

        Args:
            params: whether and where.
            run: the run folder.
            settings: resolved settings, shown as the run's config.

        Raises:
            UserError: if W&B is wanted and not installed.
        """
        self.run, self.wandb_run = run, None
        if params.wandb_project is None or rank_zero_only.rank != 0:
            return
        try:
            import wandb
        except ImportError:
            raise UserError(
                "tracking.wandb_project needs `pip install restem-lightning[wandb]`; or set it to "
                "null"
            ) from None
        self.wandb_run = wandb.init(
            project=params.wandb_project,
            name=params.wandb_name,
            mode=params.wandb_mode,
            id=read_json(run.run_json)["wandb_run_id"],
            resume="allow",
            dir=run.path,
            config=settings,
        )
        run.update_run(wandb_run_id=self.wandb_run.id)
        # W&B's own step counter would go back at each restart, so every metric names its axis.
        for prefix, axis in (("iteration", "iteration"), ("m_step", "optimizer_step")):
            self.wandb_run.define_metric(axis, hidden=axis != "iteration")
            self.wandb_run.define_metric(f"{prefix}/*", step_metric=axis)

    def m_step_loggers(self, iteration: int) -> list[Logger]:
        """Returns the loggers of one M-step: a CSV file in its folder, and W&B if there is one."""
        loggers: list[Logger] = [CSVLogger(self.run.iteration(iteration).m_step, name="log")]
        if self.wandb_run is not None:
            before = (read_json(self.run.iteration(i).metrics) for i in range(1, iteration))
            first = sum(metrics["m_step"]["optimizer_steps"] for metrics in before)
            loggers.append(_WandbMetrics(self.wandb_run, first))
        return loggers

    def log_iteration(self, metrics: dict[str, Any]) -> None:
        """Sends an iteration's metrics.json on the axis `iteration`."""
        if self.wandb_run is not None:
            values = {f"iteration/{key}": value for key, value in _flatten(metrics).items()}
            self.wandb_run.log({"iteration": metrics["iteration"], **values})

    def log_completions(self, iteration: int, store: CompletionStore, max_rows: int) -> None:
        """Sends the first completions of an E-step as a table of its own."""
        if self.wandb_run is None:
            return
        import wandb

        rows = store.read(TABLE_COLUMNS).slice(0, max_rows).to_pylist()
        table = wandb.Table(
            columns=["iteration", *TABLE_COLUMNS],
            data=[[iteration, *(row[name] for name in TABLE_COLUMNS)] for row in rows],
        )
        self.wandb_run.log({"iteration": iteration, f"completions/iteration_{iteration}": table})

    def __enter__(self) -> "Tracker":
        """Returns the tracker itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the W&B run's process; the run can be gone on with."""
        if self.wandb_run is not None:
            self.wandb_run.finish()


class _WandbMetrics(Logger):
    """Lightning's logger interface onto the loop's W&B run; Lightning's own has another axis."""

    def __init__(self, wandb_run: Any, first_step: int):
        super().__init__()
        self._wandb_run, self._first_step = wandb_run, first_step

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str:
        return self._wandb_run.id

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The run's config already holds all settings."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        values = {f"m_step/{key}": value for key, value in metrics.items()}
        self._wandb_run.log({"optimizer_step": self._first_step + (step or 0), **values})


def _flatten(value: Any, prefix: str = "") -> dict[str, float]:
    """Returns dotted path -> number; what is not a number is left out."""
    if isinstance(value, dict):
        flat: dict[str, float] = {}
        for key, item in value.items():
            flat.update(_flatten(item, f"{prefix}/{key}" if prefix else str(key)))
        return flat
    return {prefix: value} if isinstance(value, (int, float)) else {}
