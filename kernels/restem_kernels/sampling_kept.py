"""The draw of one row from what top-k, top-p and min-p leave of it; part of `sampling`.

Values are compared as the reference compares them, as x / T in float32, so that ties are its ties.
Thresholds are searched for among all values of the dtype, 8 at a time: 6 rounds for the 16 bits
of float16 or bfloat16, 11 for float32.

Shape legend: B rows (one sequence each), V vocabulary. `scale` is a pair: the top logit of the row,
and T.
"""

import triton
import triton.language as tl

from restem_kernels.noise import noise_of

_PIVOTS = tl.constexpr(8)
_NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def weight(x, top, temperature):
    """Returns exp((x - top) / T)."""
    return tl.exp((x - top) * (1.0 / temperature))


@triton.jit
def total(tiles_ptr, which, num_tiles, temperature, TILES: tl.constexpr):
    """Returns the top logit of a row and the sum of its weights, from those of its tiles.

    Args:
        tiles_ptr: [3, num_tiles] float32, of each tile the top and two sums of weights.
        which: 1 or 2, the sums to take.
        num_tiles: tiles of a row.
        temperature: of these weights.
        TILES: a power of two, at least num_tiles.
    """
    index = tl.arange(0, TILES)
    inside = index < num_tiles
    tops = tl.load(tiles_ptr + index, mask=inside, other=_NEG_INF)
    sums = tl.load(tiles_ptr + which * num_tiles + index, mask=inside, other=0.0)
    top = tl.max(tops)
    return top, tl.sum(sums * weight(tops, top, temperature))


@triton.jit
def _load(values_ptr, length, start, SIZE: tl.constexpr):
    """Returns the values from start on, float32, -inf behind the last."""
    offsets = start + tl.arange(0, SIZE)
    return tl.load(values_ptr + offsets, mask=offsets < length, other=_NEG_INF).to(tl.float32)


@triton.jit
def _value(place, dtype: tl.constexpr):
    """Returns the value, float32, at a place (int64) in the order of all values of a dtype.

    NaN above the place of infinity.
    """
    BITS: tl.constexpr = dtype.primitive_bitwidth
    LAST: tl.constexpr = 2 ** (BITS - 1) - 1
    place = tl.minimum(place, LAST)
    bits = place ^ ((place >> 63) & LAST)
    bits = bits.to(tl.int16) if BITS == 16 else bits.to(tl.int32)
    return bits.to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _search(values_ptr, length, goal, floor, scale, MASS: tl.constexpr, CHUNK: tl.constexpr):
    """Returns the last place, see `_value`, that still has enough of some values above it.

    Without MASS: at least `goal` values at or above it. With MASS: values above it with weights
    that sum to at least `goal`, where values with x / T below `floor` do not count. The place of
    -inf where there is none such.
    """
    dtype: tl.constexpr = values_ptr.dtype.element_ty
    LOWEST: tl.constexpr = (  # the place of -inf
        -0x7F800001 if dtype == tl.float32 else -0x7F81 if dtype == tl.bfloat16 else -0x7C01
    )
    place = tl.full([], LOWEST, tl.int64)
    width = tl.full([], 2**dtype.primitive_bitwidth, tl.int64)
    while width > 1:
        width = tl.cdiv(width, _PIVOTS)
        pivots = _value(place + width * (1 + tl.arange(0, _PIVOTS)), dtype)[:, None]
        found = tl.zeros([_PIVOTS, CHUNK], tl.float32)
        for start in range(0, length, CHUNK):
            x = _load(values_ptr, length, start, CHUNK)
            if MASS:
                score = tl.div_rn(x, scale[1])
                mass = tl.where(score >= floor, weight(x, scale[0], scale[1]), 0.0)
                above = score[None, :] > tl.div_rn(pivots, scale[1])
                found += tl.where(above, mass[None, :], 0.0)
            else:
                found += tl.where(x[None, :] >= pivots, 1.0, 0.0)
        place += width * tl.sum((tl.sum(found, 1) >= goal).to(tl.int64))
    return place


@triton.jit
def _list_groups(tops_ptr, num_groups, listed_ptr, floor, scale, CHUNK: tl.constexpr):
    """Writes which groups hold a token with x / T at or above floor, and returns their number."""
    count = tl.full([], 0, tl.int32)
    for start in range(0, num_groups, CHUNK):
        tops = _load(tops_ptr, num_groups, start, CHUNK)
        wanted = ((tl.div_rn(tops, scale[1]) >= floor) & (tops > _NEG_INF)).to(tl.int32)
        places = count + tl.cumsum(wanted, 0) - 1
        tl.store(listed_ptr + places, start + tl.arange(0, CHUNK), mask=wanted > 0)
        count += tl.sum(wanted)
    tl.debug_barrier()  # threads read on what others wrote
    return count


@triton.jit
def _gather(
    logits_ptr,
    num_tokens,
    listed_ptr,
    num_listed,
    kept_ptr,
    kept_ids_ptr,
    floor,
    scale,
    GROUP: tl.constexpr,
    BATCH: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Writes the tokens with x / T at or above floor, but -inf, in order, as far as they fit.

    Returns their number, and the sum of the weights of those above floor.
    """
    count = tl.full([], 0, tl.int32)
    mass = tl.zeros([BATCH, GROUP], tl.float32)
    for start in range(0, num_listed, BATCH):
        index = start + tl.arange(0, BATCH)
        groups = tl.load(listed_ptr + index, mask=index < num_listed, other=0)
        token_ids = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        inside = (index < num_listed)[:, None] & (token_ids < num_tokens)
        x = tl.load(logits_ptr + token_ids, mask=inside, other=_NEG_INF)
        wide = x.to(tl.float32)
        score = tl.div_rn(wide, scale[1])
        wanted = ((score >= floor) & (wide > _NEG_INF)).to(tl.int32)
        in_groups = tl.sum(wanted, 1)
        places = count + (tl.cumsum(in_groups, 0) - in_groups)[:, None] + tl.cumsum(wanted, 1) - 1
        stored = (wanted > 0) & (places < CAPACITY)
        tl.store(kept_ptr + places, x, mask=stored)
        tl.store(kept_ids_ptr + places, token_ids, mask=stored)
        count += tl.sum(in_groups)
        mass += tl.where(score > floor, weight(wide, scale[0], scale[1]), 0.0)
    tl.debug_barrier()  # threads read on what others wrote
    return count, tl.sum(mass)


@triton.jit
def _nucleus(
    values_ptr, length, mass, top_p, floor, scale, TOP_K: tl.constexpr, CHUNK: tl.constexpr
):
    """Returns the least x / T that top-p keeps.

    Args:
        values_ptr: all values of the row that it can keep, and maybe more.
        length: their number.
        mass: the sum of the weights of the row; not read with top-k.
        top_p: share of the mass.
        floor: the least x / T that top-k keeps.
        scale: see above.
        TOP_K: whether there is top-k.
        CHUNK: values taken at a time.
    """
    if TOP_K:
        weights = tl.zeros([CHUNK], tl.float32)
        for start in range(0, length, CHUNK):
            x = _load(values_ptr, length, start, CHUNK)
            kept = tl.div_rn(x, scale[1]) >= floor
            weights += tl.where(kept, weight(x, scale[0], scale[1]), 0.0)
        mass = tl.sum(weights)
    place = _search(values_ptr, length, top_p * mass, floor, scale, True, CHUNK)
    # The next value has too little above it: it is the least to be kept.
    return tl.div_rn(_value(place + 1, values_ptr.dtype.element_ty), scale[1])


@triton.jit
def _draw(
    values_ptr,
    length,
    num_tokens,
    ids_ptr,
    has_ids,
    threshold,
    scale,
    row,
    key_ptr,
    completion_index_ptr,
    position_ptr,
    CHUNK: tl.constexpr,
):
    """Returns the token with the largest sum of x / T and noise, and the sum of the weights.

    Both of the values with x / T at or above threshold, but -inf. Without ids a value's place is
    its token. Token 0 where there is no such value.
    """
    best, token = tl.full([], _NEG_INF, tl.float32), tl.full([], 0, tl.int32)
    mass = tl.full([], 0.0, tl.float32)
    for start in range(0, length, CHUNK):
        x = _load(values_ptr, length, start, CHUNK)
        score = tl.div_rn(x, scale[1])
        kept = (score >= threshold) & (x > _NEG_INF)
        if tl.max(kept.to(tl.int32)) > 0:
            token_ids = start + tl.arange(0, CHUNK)
            if has_ids:
                token_ids = tl.load(ids_ptr + token_ids, mask=token_ids < length, other=0)
            noise = noise_of(token_ids, row, key_ptr, completion_index_ptr, position_ptr)
            sums = tl.where(kept, score + noise, _NEG_INF)
            here = tl.max(sums)
            if here > best:  # values come in the order of their tokens: the first one wins
                best, token = here, tl.min(tl.where(sums == here, token_ids, num_tokens))
            mass += tl.sum(tl.where(kept, weight(x, scale[0], scale[1]), 0.0))
    return token, mass


@triton.jit
def draw_from_kept_kernel(
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
    listed_ptr,
    kept_ptr,
    kept_ids_ptr,
    reserve,
    top_p,
    log_min_p,
    SCALED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Draws the token of one row; reserve is k with top-k, else the groups to gather from."""
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    logits_ptr += row * row_stride
    tiles_ptr += row * 3 * num_tiles
    tops_ptr += row * num_groups
    listed_ptr += row * num_groups
    kept_ptr += row * CAPACITY
    kept_ids_ptr += row * CAPACITY
    highest, raw = total(tiles_ptr, 1, num_tiles, 1.0, TILES)
    scale = (highest, temperature)

    threshold = tl.div_rn(highest, temperature) + log_min_p  # of min-p
    floor = tl.full([], _NEG_INF, tl.float32)
    if TOP_K or TOP_P:
        place = _search(tops_ptr, num_groups, reserve, floor, scale, False, CHUNK)
        floor = tl.div_rn(_value(place, dtype), temperature)
    if not TOP_K:
        floor = tl.maximum(floor, threshold)
    num_listed = _list_groups(tops_ptr, num_groups, listed_ptr, floor, scale, CHUNK)
    count, mass_above = _gather(
        *(logits_ptr, num_tokens, listed_ptr, num_listed, kept_ptr, kept_ids_ptr, floor, scale),
        *(GROUP, 2 * CHUNK // GROUP, CAPACITY),
    )
    enough = count <= CAPACITY
    mass = raw
    if TOP_P and not TOP_K:
        mass = total(tiles_ptr, 2 if SCALED else 1, num_tiles, temperature, TILES)[1]
        enough = enough & ((mass_above >= top_p * mass) | (floor == threshold))
    length = tl.where(enough, count, num_tokens)
    values_ptr = logits_ptr
    if enough:
        values_ptr = kept_ptr

    floor = tl.full([], _NEG_INF, tl.float32)  # of top-k
    if TOP_K:
        place = _search(values_ptr, length, reserve, floor, scale, False, CHUNK)
        floor = tl.div_rn(_value(place, dtype), temperature)
        threshold = tl.maximum(threshold, floor)
    if TOP_P:
        nucleus = _nucleus(values_ptr, length, mass, top_p, floor, scale, TOP_K, CHUNK)
        threshold = tl.maximum(threshold, nucleus)
    token, kept_mass = _draw(
        *(values_ptr, length, num_tokens, kept_ids_ptr, enough, threshold, scale),
        *(row, key_ptr, completion_index_ptr, position_ptr, CHUNK),
    )
    below = tl.load(logits_ptr + token).to(tl.float32) - highest
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(logprobs_ptr + row, below - tl.log(raw))
    tl.store(sampling_logprobs_ptr + row, below / temperature - tl.log(kept_mass))
