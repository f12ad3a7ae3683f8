"""The addressed Gumbel noise of `reference` inside Triton kernels, to the last bit.

A kernel that calls these must be launched with enable_fp_fusion=False: the noise is defined by
products and sums that are rounded one by one.
"""

import math

import triton
import triton.language as tl

_ROUND_A, _ROUND_B = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
_KEY_A, _KEY_B = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)
_LN_2 = tl.constexpr(math.log(2.0))
_SQRT_HALF = tl.constexpr(0x3F3504F3)  # the bits of sqrt(0.5) in float32


@triton.jit
def words_of(counter, row, key_ptr, completion_index_ptr, position_ptr):
    """Returns the four Philox words (uint32) of each counter at a row's address.

    Args:
        counter: token // 4, uint32.
        row: the row of the batch.
        key_ptr: [B, 2] int64, contiguous.
        completion_index_ptr: [B] int64, contiguous.
        position_ptr: [B] int64, contiguous.
    """
    low = tl.load(key_ptr + 2 * row).to(tl.uint32)
    high = tl.load(key_ptr + 2 * row + 1).to(tl.uint32)
    position = tl.load(position_ptr + row).to(tl.uint32)
    completion_index = tl.load(completion_index_ptr + row).to(tl.uint32)
    words = counter, position, completion_index, tl.zeros_like(counter)
    for _ in tl.static_range(10):
        a, b = words[0].to(tl.uint64) * _ROUND_A, words[2].to(tl.uint64) * _ROUND_B
        words = (
            (b >> 32).to(tl.uint32) ^ words[1] ^ low,
            b.to(tl.uint32),
            (a >> 32).to(tl.uint32) ^ words[3] ^ high,
            a.to(tl.uint32),
        )
        low, high = low + _KEY_A, high + _KEY_B
    return words


@triton.jit
def _log(exponent, fraction):
    """Returns log(2**exponent * (1 + fraction)), float32."""
    s = tl.div_rn(fraction, fraction + 2.0)
    z = s * s
    series = 1.0 + z * (1 / 3 + z * (1 / 5 + z * (1 / 7)))
    return exponent * _LN_2 + (s + s) * series


@triton.jit
def _split(x):
    """Returns exponent and fraction of a float32 for `_log`."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF) >> 23
    fraction = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    return exponent.to(tl.float32), fraction


@triton.jit
def to_gumbel(bits):
    """Returns `reference.to_gumbel` of uint32 words."""
    uniform = tl.minimum(bits.to(tl.float32) * 2.0**-32 + 2.0**-33, 1.0 - 2.0**-24)
    exponent, fraction = _split(1.0 - uniform)
    exponential = -_log(exponent, tl.where(exponent == 0.0, -uniform, fraction))
    exponent, fraction = _split(exponential)
    return -_log(exponent, fraction)


@triton.jit
def noise_of(token_ids, row, key_ptr, completion_index_ptr, position_ptr):
    """Returns `reference.gumbel_noise` of some tokens (int32) of a row."""
    counter = (token_ids >> 2).to(tl.uint32)
    words = words_of(counter, row, key_ptr, completion_index_ptr, position_ptr)
    even = tl.where((token_ids & 2) == 0, words[0], words[2])
    odd = tl.where((token_ids & 2) == 0, words[1], words[3])
    return to_gumbel(tl.where((token_ids & 1) == 0, even, odd))


@triton.jit
def noise_bounds(counter, row, key_ptr, completion_index_ptr, position_ptr):
    """Returns at least the noise of the tokens 4 counter .. 4 counter + 3, in order, fast.

    By at most 0.06 too much where the noise is large, so that it can win.
    """
    words = words_of(counter, row, key_ptr, completion_index_ptr, position_ptr)
    bits = tl.join(tl.join(words[0], words[2]), tl.join(words[1], words[3]))
    # -log(-log(1 - u)) <= -log(u), and the bits of a float32 x, as a number, are 2**23 times at
    # most log2(x) + 127.
    logarithm = bits.to(tl.float32).to(tl.int32, bitcast=True).to(tl.float32)
    bounds = (127 + 32) * _LN_2 - logarithm * (_LN_2 * 2.0**-23)
    return tl.reshape(bounds, [4 * counter.shape[0]])
