"""Drawing the next token in Triton: meets `reference.sample_tokens`, which defines it.

Two launches. `_scan_kernel` reads every logit once, at the speed of memory; it leaves the sums of
exp of each tile, and the top of each group of 128 tokens. The second launch, one program per row,
reads on only in the groups whose top can matter:

- Nothing excluded, or temperature 0 (`_draw_from_all_kernel`): a group's top is an upper bound of
  logit / T + noise, made with fast logarithms. Groups are drawn from exactly in falling order of
  this bound, until it lies below the best sum so far; that is mostly one or two.
- Else (`sampling_kept`): the k-th largest top is a lower bound of the k-th largest logit. The few
  tokens above it are gathered, and thresholds and noise are made for them alone. top-p without
  top-k gathers from 1024 groups, and checks that they hold the mass. Where the gathered tokens do
  not fit (masses of ties, k beyond the number of groups) or do not suffice (top-p of a flat
  distribution), the same code runs over the whole row instead: right, but slower, with 6 passes
  over the row for each of top-k and top-p (float32: 11) and one or two more.

Shapes of tiles depend on the vocabulary and the settings alone, so a row's bits do not depend on
the batch. Nothing waits for the device, so the call can be captured in a CUDA graph.

Shape legend: B rows (one sequence each), V vocabulary.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from restem_kernels.noise import noise_bounds, noise_of
from restem_kernels.sampling_kept import draw_from_kept_kernel, total, weight

_TILE = 4096  # tokens of one program of the scan
_GROUP = 128
_CAPACITY = 4096  # tokens gathered at most
_RESERVE = 1024  # groups to gather from for top-p without top-k
_NEG_INF = tl.constexpr(float("-inf"))


def sample_tokens(
    logits: Tensor,
    key: Tensor,
    completion_index: Tensor,
    position: Tensor,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what `reference.sample_tokens` returns; a row's result depends on that row alone.

    A row with a NaN, or of -inf alone, gives some token of the vocabulary and NaN as its first
    log-probability.

    Args:
        logits: [B, V] float32, float16 or bfloat16; rows may lie apart, elements of a row may not.
        key: [B, 2] int64, see `reference.gumbel_noise`.
        completion_index: [B] int64.
        position: [B] int64.
        temperature: 0 takes the likeliest token, the lowest id among equals.
        top_k: see `reference.process_logits`, as the next two.
        top_p: see there.
        min_p: see there.

    Returns:
        tokens [B] int64, and their two log-probabilities [B] float32, as the reference.
    """
    num_rows, num_tokens = logits.shape
    assert logits.stride(1) == 1
    temperature, top_p = float(temperature), float(top_p)  # kernels know 2 and 2.0 apart
    greedy = temperature == 0.0
    top_k = top_k if 0 < top_k < num_tokens else 0
    everything = greedy or not (top_k or top_p < 1.0 or min_p > 0.0)
    bounded = everything and not greedy
    scaled = (bounded or (top_p < 1.0 and not top_k)) and temperature not in (0.0, 1.0)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(num_rows, *shape, dtype=dtype, device=logits.device)

    num_tiles, num_groups = triton.cdiv(num_tokens, _TILE), triton.cdiv(num_tokens, _GROUP)
    tiles = empty(3, num_tiles)
    tops = empty(num_groups, dtype=torch.float32 if bounded else logits.dtype)
    results = (empty(dtype=torch.int64), empty(), empty())
    arguments = (
        *(logits, logits.stride(0), num_tokens, num_groups, num_tiles),
        *(key.contiguous(), completion_index.contiguous(), position.contiguous()),
        *(temperature, tiles, tops),
    )
    blocks = {"SCALED": scaled, "GROUP": _GROUP, "enable_fp_fusion": False}
    _scan_kernel[(num_tiles, num_rows)](*arguments, **blocks, BOUNDED=bounded, TILE=_TILE)
    blocks |= {"TILES": triton.next_power_of_2(num_tiles)}
    if everything:
        groups = triton.next_power_of_2(num_groups)
        _draw_from_all_kernel[(num_rows,)](
            *arguments, *results, **blocks, GREEDY=greedy, GROUPS=groups
        )
        return results
    draw_from_kept_kernel[(num_rows,)](
        *(*arguments, *results, empty(num_groups, dtype=torch.int32)),
        *(empty(_CAPACITY, dtype=logits.dtype), empty(_CAPACITY, dtype=torch.int32)),
        *(top_k or _RESERVE, top_p, math.log(min_p) if min_p > 0.0 else -math.inf),
        **blocks,
        TOP_K=top_k > 0,
        TOP_P=top_p < 1.0,
        CHUNK=512 if top_k else 1024,
        CAPACITY=_CAPACITY,
        num_warps=4 if top_k else 8,
    )
    return results


@triton.jit
def _scan_kernel(
    logits_ptr,
    row_stride,
    num_tokens,
    num_groups,
    num_tiles,
    key_ptr,
    completion_index_ptr,
    position_ptr,
    temperature,
    tiles_ptr,
    tops_ptr,
    BOUNDED: tl.constexpr,
    SCALED: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Writes of one tile: its top, its sums of exp, and the top (or bound) of each group."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    groups = tl.arange(0, TILE // GROUP)
    offsets = tile * TILE + groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(logits_ptr + row * row_stride + offsets, mask=offsets < num_tokens, other=_NEG_INF)
    x = x.to(tl.float32)
    tops = tl.max(x, 1)
    top = tl.max(tops)
    reference_point = tl.where(top == _NEG_INF, 0.0, top)
    tiles_ptr += row * 3 * num_tiles + tile
    tl.store(tiles_ptr, top)
    tl.store(tiles_ptr + num_tiles, tl.sum(weight(x, reference_point, 1.0)))
    if SCALED:
        tl.store(tiles_ptr + 2 * num_tiles, tl.sum(weight(x, reference_point, temperature)))
    if BOUNDED:
        counter = (tile * (TILE // 4) + tl.arange(0, TILE // 4)).to(tl.uint32)
        bounds = noise_bounds(counter, row, key_ptr, completion_index_ptr, position_ptr)
        scores = x * (1.0 / temperature)
        tops = tl.max(scores + tl.reshape(bounds, [TILE // GROUP, GROUP]), 1)
    groups += tile * (TILE // GROUP)
    tl.store(tops_ptr + row * num_groups + groups, tops, mask=groups < num_groups)


@triton.jit
def _draw_from_all_kernel(
    logits_ptr,
    row_stride,
    num_tokens,
    num_groups,
    num_tiles,
    key_ptr,
    completion_index_ptr,
    position_ptr,
    temperature,
    tiles_ptr,
    tops_ptr,
    tokens_ptr,
    logprobs_ptr,
    sampling_logprobs_ptr,
    SCALED: tl.constexpr,
    GREEDY: tl.constexpr,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Draws the token of one row from its whole vocabulary, or takes the likeliest one."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    index = tl.arange(0, GROUPS)
    tops_ptr += row * num_groups + index
    tops = tl.load(tops_ptr, mask=index < num_groups, other=_NEG_INF).to(tl.float32)
    best, token = tl.full([], _NEG_INF, tl.float32), tl.full([], 0, tl.int32)
    top, needed = tl.max(tops), best
    while top > needed:
        group = tl.min(tl.where(tops == top, index, num_groups))
        token_ids = group * GROUP + tl.arange(0, GROUP)
        inside = token_ids < num_tokens
        sums = tl.load(logits_ptr + token_ids, mask=inside, other=_NEG_INF).to(tl.float32)
        if not GREEDY:
            noise = noise_of(token_ids, row, key_ptr, completion_index_ptr, position_ptr)
            sums = tl.div_rn(sums, temperature) + noise
        here = tl.max(sums)
        first = tl.min(tl.where(sums == here, token_ids, num_tokens))
        if (here > best) | ((here == best) & (first < token)):
            best, token = here, first
        needed = best
        if not GREEDY:
            needed -= 2e-3 + 1e-5 * tl.abs(best)  # the rounding of a bound, several times over
        tops = tl.where(index == group, _NEG_INF, tops)
        top = tl.max(tops)
    tiles_ptr += row * 3 * num_tiles
    highest, raw = total(tiles_ptr, 1, num_tiles, 1.0, TILES)
    below = tl.load(logits_ptr + token).to(tl.float32) - highest
    sampling_logprob = 0.0
    if not GREEDY:
        mass = total(tiles_ptr, 2 if SCALED else 1, num_tiles, temperature, TILES)[1]
        sampling_logprob = below / temperature - tl.log(mass)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(logprobs_ptr + row, below - tl.log(raw))
    tl.store(sampling_logprobs_ptr + row, sampling_logprob)
