"""The verb: counts from the settings, rates from a trial or on paper, a table."""

import json
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from restem_lightning.errors import UserError
from restem_lightning.fit import (
    ReSTEMCLI,
    check_settings,
    iterations_that_differ,
    load_problems,
    make_cli,
    make_loop,
)
from restem_lightning.loop.callback import VALIDATION_CACHE_TOKENS
from restem_lightning.loop.learned import PreferenceParams
from restem_lightning.loop.mixing import MixParams
from restem_lightning.loop.shared import Loop
from restem_lightning.loop.stop_request import StopRequest
from restem_lightning.loop.tracking import Tracker, TrackingParams
from restem_lightning.m_step.packing import pack_step
from restem_lightning.plan.costs import Plan, Rates, Volume, make_plan, shown
from restem_lightning.plan.paper import Decoding, Shape, Training, rates_on_paper
from restem_lightning.plan.training import real_sequences
from restem_lightning.plan.trial import try_out
from restem_lightning.run_dir import RunDir
from restem_lightning.sampler.engine import CUDA_BATCH, CUDA_CACHE_SHARE
from restem_lightning.settings import open_verifiers, resolve_policy


@dataclass(frozen=True, kw_only=True)
class PlanParams:
    """How a plan gets its rates.

    Args:
        on: "here" tries a little of the run on this machine and measures; a100, h100 and h200 give
            figures on paper for such GPUs, as many as trainer.devices x trainer.num_nodes says.
        seconds: of the trial, for each kind of completions and for the optimizer steps, about; one
            batch of the sampler and one full micro-batch (with preference.learn a batch of pairs
            too) are always taken, for nothing less shows the memory.
        completion_tokens: on paper, tokens of a completion; null for half of
            sampling.max_new_tokens.
        acceptance_rate: on paper, the share of correct completions.
        json: print JSON instead of a table.
    """

    on: Literal["here", "a100", "h100", "h200"] = "here"
    seconds: float = 10.0
    completion_tokens: float | None = None
    acceptance_rate: float = 0.5
    json: bool = False

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is not allowed.
        """
        if self.seconds <= 0:
            raise UserError(f"plan.seconds ({self.seconds}) must be above 0")
        if not 0 < self.acceptance_rate <= 1:
            raise UserError(
                f"plan.acceptance_rate ({self.acceptance_rate}) must be above 0 and at most 1"
            )


class PlanCLI(ReSTEMCLI):
    """The command line of `restem fit`, and how to plan."""

    def add_arguments_to_parser(self, parser) -> None:
        """Adds the settings of the plan to those of the run."""
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(PlanParams, "plan")


def plan(words: list[str]) -> None:
    """`restem plan`: says what a run will take.

    Raises:
        UserError: for a user's mistake.
    """
    libraries_s, start = time.process_time(), time.monotonic()  # no clock ran while they loaded
    cli = make_cli(words, PlanCLI, verb="plan")
    params = cli.build(1).plan
    with opened(cli, needs_weights=params.on == "here") as (loop, made):
        start_s = libraries_s + time.monotonic() - start
        counts = volume(cli, loop, made.preference)
        if params.on == "here":
            rates = try_out(cli, loop, made, counts, seconds=params.seconds, start_s=start_s)
        else:
            rates = _on_paper(params, counts, cli, loop, made)
    found = make_plan(counts, rates)
    print(as_json(found) if params.json else shown(found))


@contextmanager
def opened(cli: Any, *, needs_weights: bool) -> Iterator[tuple[Loop, Any]]:
    """Yields what a run's iterations would share, with a run folder that is thrown away."""
    made = cli.build(1)
    base = cli.config.policy  # on paper, config and tokenizer are enough, from a hub too
    if needs_weights or base == "embedded":
        base = resolve_policy(base)
    with tempfile.TemporaryDirectory() as name:
        run = RunDir(name)
        iterations_that_differ(cli.config)  # checks their number
        check_settings(cli.config_of(1), made, run, 1)
        with open_verifiers(cli.config.verifier, made.verification) as verifiers:
            problems = load_problems(made, verifiers)
            tracker = Tracker(TrackingParams(), run, {}, base=base, questions={})
            loop = make_loop(
                made, problems, run=run, base=base, seed=cli.settings()["seed"],
                verifiers=verifiers, tracker=tracker, stop=StopRequest(reserve_s=0),
            )  # fmt: skip
            yield loop, cli.build(1, start=base)


def volume(cli: Any, loop: Loop, preference: PreferenceParams) -> Volume:
    """Returns the counts of a run."""
    config = cli.config
    num_held_out = sum(len(problems) for problems in loop.held_out.values())
    stages = loop.evaluation.stages(loop.sampling)
    completions = {kind: params.n * num_held_out for kind, params in stages.items()}
    if loop.validation:
        completions["validation"] = len(loop.validation) * loop.validation_sampling.n
    max_epochs = max(1, config.trainer.max_epochs or 1)  # -1 is without an end
    every = config.trainer.val_check_interval or 1.0
    looks = math.ceil(max_epochs / every) if isinstance(every, float) else max_epochs
    learn = {"never": (), "last": (config.iterations,)}
    each = tuple(range(1, config.iterations + 1))
    most = cli.config_of(config.iterations).draw.num_problems  # the first may draw none, for SFT
    num_problems = len(loop.train)
    return Volume(
        iterations=config.iterations,
        num_problems=num_problems if most is None else min(most, num_problems),
        n=loop.sampling.n,
        max_per_problem=loop.selection.max_per_problem,
        max_epochs=max_epochs,
        completions=completions,
        looks=looks,
        num_ranks=_devices_of_a_node(config.trainer.devices) * config.trainer.num_nodes,
        verifiers=learn.get(preference.learn, each),
        max_pairs_per_problem=preference.max_pairs_per_problem,
        pair_epochs=preference.max_epochs,
        not_counted=_not_counted(config, loop),
    )


def _not_counted(config: Any, loop: Loop) -> tuple[str, ...]:
    """Returns the settings in use that add or save what no count of a plan holds."""
    in_use = {
        "balance": loop.balance.is_on(),
        "draw.policies": loop.draw.names() != ["previous"],
        "draw.reuse_pool": loop.draw.reuse_pool,
        "e_step.stop_at_quota": loop.e_step.stop_at_quota,
        "hint": loop.hint is not None,
        "mix": loop.mix != MixParams(),
        "per_iteration": bool(config.per_iteration),
        "trainer.max_epochs": config.trainer.max_epochs == -1,
        "trainer.max_steps": config.trainer.max_steps != -1,
    }
    return tuple(name for name, is_used in in_use.items() if is_used)


def _devices_of_a_node(devices: Any) -> int:
    """Returns how many devices Lightning's setting means: a number, a list of them, or all."""
    if isinstance(devices, list):
        return len(devices)
    number = int(devices) if str(devices).lstrip("-").isdigit() else -1
    return number if number > 0 else max(1, torch.cuda.device_count())


def as_json(found: Plan) -> str:
    """Returns a plan as a JSON object."""
    rows = {
        name: [row._asdict() for row in getattr(found, name)]
        for name in ("base", "first", "later", "verifiers")
    }
    return json.dumps({**found._asdict(), **rows})


def _on_paper(params: PlanParams, counts: Volume, cli: Any, loop: Loop, made: Any) -> Rates:
    engine = made.engine
    decoding = Decoding(
        batch=engine.max_batch_size or CUDA_BATCH,
        cache_tokens=engine.cache_tokens,
        cache_share=CUDA_CACHE_SHARE,
        validation_cache_tokens=engine.cache_tokens or VALIDATION_CACHE_TOKENS,
        completion_tokens=params.completion_tokens or loop.sampling.max_new_tokens / 2,
        acceptance_rate=params.acceptance_rate,
        parity=loop.e_step.parity_completions > 0,
    )
    training = _training(cli.config.trainer, loop, made, counts, int(decoding.completion_tokens))
    return rates_on_paper(counts, model_shape(loop.base), decoding, training, device=params.on)


def _training(
    trainer: Any, loop: Loop, made: Any, counts: Volume, completion_tokens: int
) -> Training:
    """Packs an optimizer step of real prompts, for what is shared of them need not be computed."""
    sequences = real_sequences(loop, [completion_tokens * [0]], made.data.batch_size)
    step = pack_step(
        sequences,
        tokens_per_micro_batch=made.data.tokens_per_micro_batch,
        shared_prompts=made.data.shared_prompt_packing,
        num_ranks=counts.num_ranks,
    )
    sizes = [micro_batch.input_ids.numel() for micro_batch in step.micro_batches]
    strategy = trainer.strategy
    model, half = made.model, "bf16" in str(trainer.precision)
    parameter_bytes = 4 if model.dtype_name == "float32" else 2
    return Training(
        batch_size=len(sequences),
        prompt_tokens=sum(one.prompt_length for one in sequences) / len(sequences),
        step_tokens=sum(sizes),
        micro_batches=len(sizes),
        micro_batch_tokens=max(sizes),
        parameter_bytes=parameter_bytes,
        gathered_bytes=2 if half else parameter_bytes,
        sharded="ModelParallelStrategy" in str(getattr(strategy, "class_path", strategy)),
        reshard=model.reshard_after_forward,
        checkpointing=model.activation_checkpointing,
        devices_per_node=_devices_of_a_node(trainer.devices),
    )


def model_shape(folder: str) -> Shape:
    """Returns what of a policy decides its cost; no weight is read."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return Shape(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        kv_bytes=2 * 2 * text.num_hidden_layers * key_heads * head_size,
    )
