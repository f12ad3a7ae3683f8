"""Compiles every kernel of restem_kernels for one GPU without having one; writes what each takes.

Usage: compile_worker.py 90      prints one JSON object per compiled kernel: shared memory in bytes,
registers and bytes of stack (spilled registers go there) per thread. The public functions are
called with CPU tensors, so constants, alignments and options are those of a real launch; the launch
itself is left out. A new kernel needs a call in `calls`; test_compile.py fails without one.
"""

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import restem_kernels
import torch
import triton
from restem_kernels.activation import gated_silu
from restem_kernels.attention import block_attention
from restem_kernels.kv_cache import rotate_and_write, write_kv
from restem_kernels.norm import add_rms_norm
from restem_kernels.sampling import sample_tokens
from restem_kernels.work import Work
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction

ROWS, SLOTS, BLOCKS = 3, 16, 8
# Hidden size, intermediate size, vocabulary, query heads, key heads, head size.
MODELS = {
    "SmolLM2-135M": (576, 1536, 49152, 9, 3, 64),
    "Qwen2.5-7B": (3584, 18944, 152064, 28, 4, 128),
    "Qwen3-1.7B": (2048, 6144, 151936, 16, 8, 128),
    "Gemma-3-1B": (1152, 6912, 262144, 4, 1, 256),
    "head size 80": (2560, 10240, 51200, 32, 32, 80),
}


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def work(*, attend_own: bool) -> Work:
    return Work(
        tiles=ints(5, 7),
        num_tiles=ints(1),
        members=ints(9),
        tables=ints(4, BLOCKS),
        positions=ints(ROWS),
        own_tables=ints(ROWS),
        own_starts=ints(ROWS),
        num_shared=ints(ROWS),
        attend_own=attend_own,
        split=64,
        num_pieces=5,
    )


def row_calls(model: str, dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    """Yields calls of the functions of one row."""
    hidden, intermediate, *_ = MODELS[model]
    x, weight = torch.zeros(ROWS, hidden, dtype=dtype), torch.zeros(hidden, dtype=dtype)
    yield partial(add_rms_norm, x, weight, eps=1e-6, residual=x)
    yield partial(add_rms_norm, x, weight, eps=1e-6)
    yield partial(gated_silu, torch.zeros(ROWS, 2 * intermediate, dtype=dtype))


def cache_calls(model: str, dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    """Yields calls of the functions that write to or read from the cache."""
    *_, num_heads, num_key_heads, size = MODELS[model]
    caches = [torch.zeros(BLOCKS, num_key_heads, SLOTS, size, dtype=dtype) for _ in range(2)]
    keys = torch.zeros(ROWS, num_key_heads, size, dtype=dtype)
    qkv = torch.zeros(ROWS, (num_heads + 2 * num_key_heads) * size, dtype=dtype)
    table, norm = torch.zeros(32, size, dtype=dtype), torch.zeros(size, dtype=dtype)
    decode = work(attend_own=True)
    yield partial(write_kv, keys, keys, *caches, decode)
    yield partial(rotate_and_write, qkv, table, table, *caches, decode)
    norms = {"q_norm": norm, "k_norm": norm, "eps": 1e-6}
    yield partial(rotate_and_write, qkv, table, table, *caches, decode, **norms)
    queries = torch.zeros(ROWS, num_heads, size, dtype=dtype)
    limits = {"window": 512}, {"window": 512, "softcap": 50.0}
    for some in ({}, *limits) if model.startswith("Gemma") else ({},):
        for lists in (decode, work(attend_own=False)):
            yield partial(block_attention, queries, *caches, lists, scaling=0.1, **some)


def draw_calls(model: str, dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    """Yields calls of the draw: greedy, from everything, and with each way to exclude tokens."""
    logits = torch.zeros(ROWS, MODELS[model][2], dtype=dtype)
    key = torch.zeros(ROWS, 2, dtype=torch.int64)
    address = (key, key[:, 0].contiguous(), key[:, 1].contiguous())
    yield partial(sample_tokens, logits, *address, temperature=0.0)
    yield partial(sample_tokens, logits, *address, temperature=1.0)
    yield partial(sample_tokens, logits, *address, temperature=2, top_p=1)  # as people write it
    for limits in ({"top_k": 40}, {"top_p": 0.95}, {"top_k": 40, "top_p": 0.95, "min_p": 0.02}):
        yield partial(sample_tokens, logits, *address, temperature=0.7, **limits)


def calls(arch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yields what launches every kernel of the package, with a name."""
    # Compiling takes seconds: A100 has one of each kernel, the draw one size of vocabulary.
    models = [("Qwen2.5-7B", torch.float16)]
    if arch == 90:
        models = [*((model, torch.float16) for model in MODELS), ("SmolLM2-135M", torch.float32)]
    for model, dtype in models:
        draws = draw_calls(model, dtype) if model == "Qwen2.5-7B" else ()
        for call in (*row_calls(model, dtype), *cache_calls(model, dtype), *draws):
            yield f"{model} {dtype} {call.func.__name__} {sorted(call.keywords)}", call


def as_bfloat16(value: object) -> object:
    """Returns a float16 tensor as one of bfloat16, anything else as it is."""
    half = isinstance(value, torch.Tensor) and value.dtype == torch.float16
    return value.view(torch.bfloat16) if half else value


def kernels() -> list[str]:
    """Returns the names of all kernels of the package; what they call is not named so."""
    names = []
    for module in pkgutil.iter_modules(restem_kernels.__path__, "restem_kernels."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                names.append(name)
    return sorted(set(names))


def resources(compiled: triton.compiler.CompiledKernel) -> dict[str, int]:
    """Returns what the assembler says about the binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(re.search(rf"\b{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")}


def main(arch: int) -> None:
    """Compiles everything and prints it."""
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", arch, 32),
        )
    )
    run, case, seen = JITFunction.run, "", set()

    def compile_only(kernel: JITFunction, *args, grid, warmup, **options) -> None:
        found = {"kernel": kernel.__name__, "case": case}
        # block_attention takes no bfloat16 on a CPU, where triton's interpreter would be wrong.
        options = {name: as_bfloat16(value) for name, value in options.items()}
        try:
            compiled = run(kernel, *map(as_bfloat16, args), grid=grid, warmup=True, **options)
        except triton.CompilationError as error:
            print(json.dumps(found | {"error": str(error)}), flush=True)
            return
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            found |= {"shared": compiled.metadata.shared} | resources(compiled)
            print(json.dumps(found), flush=True)

    JITFunction.run = compile_only
    for case, call in calls(arch):  # noqa: B007, compile_only reads case
        call()
    print(json.dumps({"kernels": kernels()}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
