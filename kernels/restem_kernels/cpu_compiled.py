"""All operations of the sampler for the CPU as C functions; each is defined in `reference`.

`c_library` compiles them (the sources in `native/` say how they work). They take tensors by their
addresses, so a row of numbers must lie side by side; rows and heads may be apart.

Keys lie in cache blocks in an order of their own (see native/attention.h), which nothing but
`write_kv`, `rotate_and_write` and `block_attention` knows: a cache belongs to one set of
operations.
"""

import ctypes
import functools
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from restem_kernels import c_library, cpu_sampling, reference
from restem_kernels.work import Work

NO_WINDOW = 2**30
MOST_CANDIDATES = 1024  # beyond, torch draws
_LISTS = ("tiles", "members", "tables", "positions", "own_tables", "own_starts")
_SIZES = ("num_tiles", "table_width", "num_rows", "attend_own", "num_pieces")


class _Work(ctypes.Structure):
    """`struct work` of native/attention.h."""

    _fields_ = (
        *((name, c_void_p) for name in _LISTS),
        *((name, c_int32) for name in _SIZES),
        ("chains", c_void_p),
        ("order", c_void_p),
    )


# Of a layer: keys, values, key heads, tokens in a block, head size.
_CACHE = [c_void_p, c_void_p, c_int32, c_int32, c_int32]
_ARGUMENTS = {
    "plan": [c_void_p],
    "write_kv": [c_void_p, *_CACHE, *[c_void_p, c_int64, c_int64] * 2],
    "rotate_and_write": [
        c_void_p, *_CACHE, c_void_p, c_int64, *[c_void_p] * 4, c_float, c_void_p, c_int32, c_int32,
    ],
    "block_attention": [
        c_void_p, *_CACHE, c_void_p, c_int64, c_int64, c_void_p, c_int32, c_float, c_float,
        c_int32, c_int32,
    ],
    "add_rms_norm": [
        c_void_p, c_int64, c_void_p, c_int64, *[c_void_p] * 3, c_int32, c_int32, c_float, c_int32,
    ],
    "gated_silu": [c_void_p, c_int64, c_void_p, c_int32, c_int32, c_int32],
    "top_logits": [c_void_p, c_int64, *[c_int32] * 4, *[c_void_p] * 4, c_int32],
}  # fmt: skip


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """Returns the C functions for numbers of a type.

    Raises:
        c_library.NoCompiler: if they cannot be had.
    """
    functions = c_library.load(dtype)
    for name, arguments in _ARGUMENTS.items():
        function = getattr(functions, name)
        function.argtypes, function.restype = arguments, None
    return functions


def tile_rows(group: int) -> int:
    """Returns how many rows a tile of `Work.tiles` may have: as many as there are."""
    return 2**30


class Pass:
    """A work list made ready for one forward pass: what all its layers need."""

    def __init__(self, work: Work, dtype: torch.dtype):
        """Reads the lists, which must not change before the pass is over."""
        num_rows = len(work.positions)
        self.work, self.functions = work, library(dtype)
        self.chains = torch.empty(num_rows, work.num_pieces, dtype=torch.int32)
        self.order = torch.empty(num_rows, dtype=torch.int32)
        self.c_work = _Work(
            *(getattr(work, name).data_ptr() for name in _LISTS),
            int(work.num_tiles),
            work.tables.stride(0),
            num_rows,
            work.attend_own,
            work.num_pieces,
            self.chains.data_ptr(),
            self.order.data_ptr(),
        )
        self.address = ctypes.addressof(self.c_work)
        self.functions.plan(self.address)


def prepare(work: Work, key_cache: Tensor) -> Pass:
    """Returns a work list ready for the layers of one forward pass.

    Args:
        work: its lists are contiguous; they must not change before the pass is over.
        key_cache: of any layer.
    """
    return Pass(work, key_cache.dtype)


def _cache(keys: Tensor, values: Tensor) -> tuple[int, ...]:
    assert keys.is_contiguous()
    assert values.is_contiguous()
    return keys.data_ptr(), values.data_ptr(), *keys.shape[1:]


def write_kv(
    keys: Tensor, values: Tensor, key_cache: Tensor, value_cache: Tensor, ready: Pass
) -> None:
    """Does what `reference.write_kv` does; keys lie in their block in an order of their own."""
    new = ((x.data_ptr(), x.stride(0), x.stride(1)) for x in (_rows(keys), _rows(values)))
    ready.functions.write_kv(
        ready.address, *_cache(key_cache, value_cache), *(part for x in new for part in x)
    )


def _rows(x: Tensor) -> Tensor:
    """Returns x with the numbers of its last dimension side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rotate_and_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    ready: Pass,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Does what `reference.rotate_and_write` does; keys lie as with `write_kv`."""
    qkv = _rows(qkv)
    num_key_heads, size = key_cache.shape[1], key_cache.shape[3]
    num_heads = qkv.shape[1] // size - 2 * num_key_heads
    queries = torch.empty(len(qkv), num_heads, size, dtype=qkv.dtype)
    ready.functions.rotate_and_write(
        ready.address,
        *_cache(key_cache, value_cache),
        qkv.data_ptr(),
        qkv.stride(0),
        cos.data_ptr(),
        sin.data_ptr(),
        None if q_norm is None else q_norm.data_ptr(),
        None if k_norm is None else k_norm.data_ptr(),
        eps,
        queries.data_ptr(),
        num_heads,
        torch.get_num_threads(),
    )
    return queries


def block_attention(
    queries: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    ready: Pass,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Does what `reference.block_attention` does; a row that writes to the dump block is zero."""
    queries = _rows(queries)
    mixed = torch.empty(queries.shape, dtype=queries.dtype)
    ready.functions.block_attention(
        ready.address,
        *_cache(key_cache, value_cache),
        queries.data_ptr(),
        queries.stride(0),
        queries.stride(1),
        mixed.data_ptr(),
        queries.shape[1],
        scaling,
        softcap or 0.0,
        window or NO_WINDOW,
        torch.get_num_threads(),
    )
    return mixed


def add_rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Does what `reference.add_rms_norm` does."""
    x = _rows(x)
    normed = torch.empty(x.shape, dtype=x.dtype)
    total, place, stride = x, None, 0
    if residual is not None:
        residual, total = _rows(residual), torch.empty(x.shape, dtype=x.dtype)
        place, stride = residual.data_ptr(), residual.stride(0)
    library(x.dtype).add_rms_norm(
        x.data_ptr(), x.stride(0), place, stride, weight.data_ptr(), normed.data_ptr(),
        total.data_ptr(), *x.shape, eps, torch.get_num_threads(),
    )  # fmt: skip
    return normed, total


def gated_silu(gate_up: Tensor) -> Tensor:
    """Does what `reference.gated_silu` does."""
    gate_up = _rows(gate_up)
    out = torch.empty(len(gate_up), gate_up.shape[1] // 2, dtype=gate_up.dtype)
    library(gate_up.dtype).gated_silu(
        gate_up.data_ptr(), gate_up.stride(0), out.data_ptr(), *out.shape, torch.get_num_threads()
    )
    return out


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
    """Returns what `reference.sample_tokens` returns; a row's result depends on that row alone."""
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    num_tokens = logits.shape[-1]
    width = top_k + cpu_sampling.SPARE
    in_torch = temperature == 0.0 or logits.dtype not in c_library.DTYPES
    if in_torch or not 0 < top_k < min(num_tokens, MOST_CANDIDATES):
        return cpu_sampling.sample_tokens(logits, key, completion_index, position, **settings)
    num_rows, logits = len(logits), _rows(logits)
    values = torch.empty(num_rows, width, dtype=torch.float32)
    token_ids = torch.empty(num_rows, width, dtype=torch.int64)
    counts, normalizers = torch.empty(num_rows, dtype=torch.int32), torch.empty(num_rows)
    library(logits.dtype).top_logits(
        logits.data_ptr(), logits.stride(0), num_rows, num_tokens, top_k, width,
        values.data_ptr(), token_ids.data_ptr(), counts.data_ptr(), normalizers.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    scores = reference.process_logits(values, **settings)
    noise = reference.gumbel_noise(key, completion_index, position, token_ids)
    best = (scores + noise).argmax(-1, keepdim=True)
    drawn = (
        token_ids.gather(-1, best).squeeze(-1),
        values.gather(-1, best).squeeze(-1) - normalizers,
        scores.log_softmax(-1).gather(-1, best).squeeze(-1),
    )
    if bool((counts < 0).any()):  # more ties than there is room for
        rows = (counts < 0).nonzero().squeeze(-1)
        again = (tensor[rows] for tensor in (logits, key, completion_index, position))
        for target, part in zip(drawn, reference.sample_tokens(*again, **settings), strict=True):
            target[rows] = part
    return drawn
