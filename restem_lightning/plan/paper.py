"""The rates of hardware that is elsewhere, from its data sheet; the formulas are below.

Of a model of P parameters, whose keys and values take `kv_bytes` a token; of a device with matrix
rate F and memory bandwidth W; rates are reached to the shares that well-kept engines reach.

- A decode step of B sequences that are L tokens long at the end takes
  max(2 P / (0.8 W), 2 P B / (0.6 F)) + B (L / 2) kv_bytes / (0.8 W) + 1 ms: the weights are read
  while they are multiplied, then each sequence's own keys and values are read; the prompt's are
  shared. B is `engine.max_batch_size`, or less where a rank draws less. Prefill and the last,
  emptier batches are left out.
- An optimizer step takes the longer one of its arithmetic, 6 P FLOP a token (8 P with activation
  checkpointing) at 0.4 F, and its communication, at 0.8 of the link. Tokens are those that a rank
  computes, with the shared parts of prompts once in a micro-batch. FSDP gathers the weights for
  the forward and again for the backward pass of each micro-batch and sums up float32 gradients
  (with `reshard_after_forward: false` each travels once); DDP sums up gradients, which travel
  twice. The link of a rank is the slower one of NVLink and, over several nodes, the network cards
  of all devices of a node together: what one receives, it hands on within.
- Memory of the M-step: parameters, gradients and two moments of a rank's shard (and whole weights
  and gradients with `reshard_after_forward: false`), activations of
  34 hidden_size layers bytes a token of a micro-batch (2 with checkpointing) and, where D_val is
  sampled, the sampler's bfloat16 weights and its cache. Of the E-step: bfloat16 weights and a
  cache, which takes 85 % of what is free unless `engine.cache_tokens` is set. The two do not
  overlap. 1.5 GB of libraries come to both.

- 30 s go by for each time that weights are loaded, exported, saved or handed over, and 60 s at the
  start; beside that the few tokens that parity scores count for nothing. A verifier trains on two
  sequences a pair at the rate of the M-step and scores one in a third of that time. Its memory,
  all logits of a batch of pairs, is left out.

Source: 6 P, arXiv 2001.08361 section 2.1; 34 bytes, arXiv 2205.05198 section 4. No GPU has checked
these figures yet.
"""

from dataclasses import dataclass

from restem_lightning.errors import UserError
from restem_lightning.plan.costs import Learning, Rates, Sampling, Volume


@dataclass(frozen=True, kw_only=True)
class Device:
    """What data sheets say of a device and of the machines that eight of it are sold in.

    Args:
        bandwidth: bytes/s of its memory.
        flops: bfloat16 FLOP/s, dense.
        memory_bytes: of its memory.
        nvlink: bytes/s that it receives from others of its node.
        network: bytes/s of its share of the node's network cards.
    """

    bandwidth: float
    flops: float
    memory_bytes: float
    nvlink: float
    network: float


DEVICES = {
    "a100": Device(bandwidth=2.0e12, flops=312e12, memory_bytes=80e9, nvlink=300e9, network=25e9),
    "h100": Device(bandwidth=3.35e12, flops=989e12, memory_bytes=80e9, nvlink=450e9, network=50e9),
    "h200": Device(bandwidth=4.8e12, flops=989e12, memory_bytes=141e9, nvlink=450e9, network=50e9),
}
DECODE_MATRIX_SHARE, BANDWIDTH_SHARE, TRAINING_SHARE = 0.6, 0.8, 0.4
STEP_OVERHEAD_S = 0.001
LIBRARIES_BYTES = 1.5e9  # of a process: context, buffers, kernels
GRADIENT_BYTES = 4  # summed over ranks in float32 always
TOKEN_BYTES = 12.0  # id, two log-probabilities and text, compressed (measured, GSM8K)
COMPLETION_BYTES = 50.0  # its address, verdict and share of what a part holds once (quickstart)
START_S, LOAD_S = 60.0, 30.0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What of a model decides its cost.

    Args:
        num_parameters: all of them.
        num_layers: decoder layers.
        hidden_size: width of the residual stream.
        kv_bytes: keys and values of one token over all layers, bfloat16.
    """

    num_parameters: float
    num_layers: int
    hidden_size: int
    kv_bytes: float


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """What of the sampler's settings decides its cost.

    Args:
        batch: completions decoded together.
        cache_tokens: that the KV cache holds, 0 for as many as fit in cache_share.
        cache_share: of the free memory.
        validation_cache_tokens: of the sampler beside the trainer's weights.
        completion_tokens: of one, on average.
        acceptance_rate: share of correct completions.
        parity: whether the trainer scores some of them again.
    """

    batch: int
    cache_tokens: int
    cache_share: float
    validation_cache_tokens: int
    completion_tokens: float
    acceptance_rate: float
    parity: bool


@dataclass(frozen=True, kw_only=True)
class Training:
    """What of the M-step's settings decides its cost.

    Args:
        batch_size: sequences of an optimizer step, all ranks.
        prompt_tokens: of one, on average.
        step_tokens: that a rank computes in an optimizer step.
        micro_batches: of a rank in an optimizer step.
        micro_batch_tokens: of the largest micro-batch.
        parameter_bytes: of one parameter as it is trained.
        gathered_bytes: of one parameter as FSDP gathers it.
        sharded: FSDP over all ranks; else each rank holds all (DDP).
        reshard: FSDP gathers for each pass of each micro-batch.
        checkpointing: of activations.
        devices_per_node: ranks that share a node's network cards.
    """

    batch_size: int
    prompt_tokens: float
    step_tokens: float
    micro_batches: int
    micro_batch_tokens: float
    parameter_bytes: int
    gathered_bytes: int
    sharded: bool
    reshard: bool
    checkpointing: bool
    devices_per_node: int


def rates_on_paper(
    volume: Volume, shape: Shape, decoding: Decoding, training: Training, *, device: str
) -> Rates:
    """Returns rates for a device that is not here, by the formulas above.

    Raises:
        UserError: an unknown device.
    """
    if device not in DEVICES:
        raise UserError(f"device ({device}) must be one of {', '.join(DEVICES)}, or here")
    card, size = DEVICES[device], shape.num_parameters
    drawn = {"e_step": volume.num_problems * volume.n, **volume.completions}
    compute_s = _compute_s(card, shape, training)
    communication_s = _communication_s(card, shape, training, num_ranks=volume.num_ranks)
    tokens = training.batch_size * (training.prompt_tokens + decoding.completion_tokens)
    tokens_per_s = tokens / max(compute_s, communication_s) / volume.num_ranks
    sequence_s = tokens / training.batch_size / tokens_per_s
    most = volume.n if volume.max_per_problem is None else volume.max_per_problem
    bound = "network" if communication_s > compute_s else "arithmetic"
    return Rates(
        origin=f"on paper, {device}, batch {decoding.batch}, {decoding.completion_tokens:.0f} "
        f"tokens a completion, {decoding.acceptance_rate:.0%} of them correct; optimizer steps of "
        f"{1000 * max(compute_s, communication_s):.0f} ms, bound by {bound}",
        sampling={
            kind: Sampling(
                tokens=decoding.completion_tokens,
                tokens_per_s=_decode_tokens_per_s(card, shape, decoding, num / volume.num_ranks),
                completion_bytes=COMPLETION_BYTES,
                token_bytes=TOKEN_BYTES,
            )
            for kind, num in drawn.items()
        },
        accepted_per_problem=min(most, volume.n * decoding.acceptance_rate),
        accepted_tokens=decoding.completion_tokens,
        prompt_tokens=training.prompt_tokens,
        training_tokens_per_s=tokens_per_s,
        policy_bytes=training.parameter_bytes * size,
        # Weights and two moments, and the best: new ones come before the old ones go.
        checkpoint_bytes=2 * (3 + 1) * training.parameter_bytes * size,
        memory_bytes=_memory_bytes(card, volume, shape, decoding, training),
        waiting_bytes=_waiting_bytes(volume, decoding, training),
        start_s=START_S,
        load_s=LOAD_S,
        parity_s=LOAD_S if decoding.parity else 0.0,
        m_step_s=2 * LOAD_S,
        hand_over_s=LOAD_S,
        checkpoint_s=LOAD_S,
        learning=_learning(volume, decoding, sequence_s),
    )


def _waiting_bytes(volume: Volume, decoding: Decoding, training: Training) -> float:
    """Returns what waits of a problem for selection: ids, log-probabilities and text, plain."""
    waiting = 1 + volume.n * decoding.acceptance_rate
    return waiting * (4 * training.prompt_tokens + 12 * decoding.completion_tokens)


def _learning(volume: Volume, decoding: Decoding, sequence_s: float) -> Learning:
    """Returns how a verifier comes about whose problems are all of the same difficulty."""
    correct = volume.n * decoding.acceptance_rate
    return Learning(
        mixed_share=1.0,
        pairs=correct * (volume.n - correct),
        sequences=volume.n,
        pair_s=2 * sequence_s,
        sequence_s=sequence_s / 3,
        load_s=3 * LOAD_S,
    )


def _decode_tokens_per_s(
    card: Device, shape: Shape, decoding: Decoding, num_completions: float
) -> float:
    """Returns the rate at which a rank draws so many completions."""
    batch = min(decoding.batch, max(num_completions, 1))
    bandwidth = BANDWIDTH_SHARE * card.bandwidth
    weights_s = max(
        2 * shape.num_parameters / bandwidth,
        2 * shape.num_parameters * batch / (DECODE_MATRIX_SHARE * card.flops),
    )
    own_s = batch * decoding.completion_tokens / 2 * shape.kv_bytes / bandwidth
    return batch / (weights_s + own_s + STEP_OVERHEAD_S)


def _compute_s(card: Device, shape: Shape, training: Training) -> float:
    """Returns the seconds that the arithmetic of an optimizer step takes."""
    flops = (8 if training.checkpointing else 6) * shape.num_parameters * training.step_tokens
    return flops / (TRAINING_SHARE * card.flops)


def _communication_s(card: Device, shape: Shape, training: Training, *, num_ranks: int) -> float:
    """Returns the seconds that the ranks' exchange in an optimizer step takes."""
    if num_ranks == 1:
        return 0.0
    link = card.nvlink
    if num_ranks > training.devices_per_node:
        link = min(link, training.devices_per_node * card.network)
    moved = 2 * GRADIENT_BYTES
    if training.sharded:
        times = training.micro_batches if training.reshard else 1
        moved = times * ((2 if training.reshard else 1) * training.gathered_bytes + GRADIENT_BYTES)
    share = (num_ranks - 1) / num_ranks  # the rest is its own
    return share * moved * shape.num_parameters / (BANDWIDTH_SHARE * link)


def _memory_bytes(
    card: Device, volume: Volume, shape: Shape, decoding: Decoding, training: Training
) -> float:
    """Returns the most that a rank holds."""
    policy = 2 * shape.num_parameters
    shards = volume.num_ranks if training.sharded else 1
    activations = training.micro_batch_tokens * shape.hidden_size * shape.num_layers
    m_step = 4 * training.parameter_bytes * shape.num_parameters / shards
    if training.sharded and not training.reshard:
        m_step += (training.gathered_bytes + GRADIENT_BYTES) * shape.num_parameters
    m_step += activations * (2 if training.checkpointing else 34)
    if "validation" in volume.completions:
        m_step += policy + decoding.validation_cache_tokens * shape.kv_bytes
    cache = decoding.cache_tokens * shape.kv_bytes
    if not decoding.cache_tokens:
        cache = max(0.0, decoding.cache_share * (card.memory_bytes - LIBRARIES_BYTES - policy))
    return LIBRARIES_BYTES + max(m_step, policy + cache)
