"""Checks of a run's settings before anything is written."""

from typing import Any

from transformers import AutoTokenizer

from restem_lightning.errors import UserError
from restem_lightning.loop.draw import DrawParams
from restem_lightning.loop.quota import check_quota
from restem_lightning.m_step.lora import check_peft
from restem_lightning.m_step.stopping import stop_callbacks
from restem_lightning.m_step.tensor_parallel import check_compile, check_split
from restem_lightning.per_iteration import values_by_setting
from restem_lightning.run_dir import RunDir
from restem_lightning.settings import resolve_policy

# What the loop gives each Trainer itself.
OWN_TRAINER_SETTINGS = ("logger", "default_root_dir", "fast_dev_run")
# With which at 0 an M-step would train nothing, or not look at D_val.
NONZERO = ("max_epochs", "max_steps", "limit_train_batches", "val_check_interval")


def iterations_that_differ(config: Any) -> range:
    """Returns the iterations up to the last one that `per_iteration` has a value of its own for.

    Raises:
        UserError: the number of iterations or `per_iteration` is not allowed.
    """
    if config.iterations < 1:
        raise UserError(f"iterations ({config.iterations}) must be at least 1")
    by_setting = values_by_setting(config.per_iteration, config)
    lengths = [len(values) for values in by_setting.values()]
    return range(1, min(config.iterations, max([1, *lengths])) + 1)


def check_settings(config: Any, made: Any, run: RunDir, iteration: int) -> None:
    """Checks what no single setting can check by itself.

    Raises:
        UserError: settings do not fit together.
    """
    if made.draw.reuse_pool and iteration == 1:
        raise UserError("draw.reuse_pool (true) must be false in iteration 1: there is no pool yet")
    if made.carry_optimizer and (made.start_from, made.stop.rule) != ("previous", "none"):
        raise UserError(
            f"carry_optimizer (true) needs start_from previous ({made.start_from}) and stop.rule "
            f"none ({made.stop.rule}): the state fits the last weights only; set these"
        )
    if made.carry_optimizer and config.model.lora:
        raise UserError(
            "carry_optimizer (true) must be false with model.lora: each M-step trains fresh "
            "adapters, which the state of those before does not fit"
        )
    if made.draw.num_problems == 0 and made.mix.human == "none":
        raise UserError("draw.num_problems (0) leaves nothing to train on; set mix.human")
    for name in OWN_TRAINER_SETTINGS:
        if value := config.trainer[name]:
            raise UserError(f"trainer.{name} ({value}) is set by the loop; remove it")
    for name in NONZERO:
        if config.trainer[name] == 0:
            raise UserError(f"trainer.{name} (0) leaves nothing to train or to look at; raise it")
    if config.model.lora is not None:
        check_peft()
    _check_parallel_sizes(config.trainer)
    if config.model.compile:
        check_compile(_tensor_parallel_size(config.trainer))
    n, most = made.sampling.n * len(made.draw.names()), made.selection.max_per_problem
    if most is not None and most > n and made.draw.num_problems != 0:
        raise UserError(
            f"selection.max_per_problem ({most}) must be at most sampling.n ({n}); lower it or "
            "draw more"
        )
    if made.e_step.stop_at_quota:
        num_pools = len(made.draw.names()) + (made.hint is not None)
        check_quota(made.selection, num_pools=num_pools)
        if made.scoring.scorer is not None:
            raise UserError(
                "e_step.stop_at_quota (true) must be false with scoring.scorer: scores come only "
                "once all completions are drawn"
            )
    stop_callbacks(made.stop.rule, patience=made.stop.patience, folder=run.path)  # checks both
    if made.problems.validation is None and (made.stop.rule != "none" or made.stop.at_plateau):
        raise UserError(
            f"stop.rule ({made.stop.rule}) and stop.at_plateau ({made.stop.at_plateau}) need "
            "problems.validation; give it, or set them to none and false"
        )
    if taken := {"train", "validation"} & set(made.problems.held_out):
        raise UserError(f"problems.held_out must not name a set {taken.pop()}; rename it")


def _check_parallel_sizes(trainer: Any) -> None:
    """Checks that the sizes of ModelParallelStrategy make up the ranks, where all are given."""
    data, tensor = (_parallel_size(trainer, kind) for kind in ("data", "tensor"))
    if not (isinstance(data, int) and isinstance(tensor, int) and str(trainer.devices).isdigit()):
        return
    num_ranks = trainer.num_nodes * int(trainer.devices)
    if data * tensor != num_ranks:
        raise UserError(
            f"data_parallel_size ({data}) times tensor_parallel_size ({tensor}) must be the number "
            f"of ranks ({num_ranks} = trainer.num_nodes x trainer.devices); change one of them"
        )


def _parallel_size(trainer: Any, kind: str) -> Any:
    sizes = getattr(trainer.strategy, "init_args", None) or {}
    return sizes.get(f"{kind}_parallel_size")


def _tensor_parallel_size(trainer: Any) -> int:
    """Returns the size where it is given, 1 where it is not."""
    size = _parallel_size(trainer, "tensor")
    return size if isinstance(size, int) else 1


def check_policies(config: Any, base: str) -> None:
    """Checks the policies that an iteration starts from and draws from.

    Raises:
        UserError: one is no whole policy, does not split as asked for, or draws other token ids
            than the base model's.
    """
    start = base
    if config.start_from not in ("base", "previous"):
        start = resolve_policy(config.start_from, setting="start_from")
    if (size := _tensor_parallel_size(config.trainer)) > 1:
        check_split(start, size)
    vocabulary = AutoTokenizer.from_pretrained(base).get_vocab()
    for name in DrawParams(**config.draw.as_dict()).names():
        if name not in ("base", "previous"):
            folder = resolve_policy(name, setting="draw.policies")
            if AutoTokenizer.from_pretrained(folder).get_vocab() != vocabulary:
                raise UserError(
                    f"draw.policies ({name}) must have the tokenizer of the policy ({base}): the "
                    "M-step trains on the token ids that were drawn; choose another one"
                )
