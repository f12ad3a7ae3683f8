"""Cases of bench_kernels.py: the machine's limits, and the kernels that go row by row."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from restem_kernels import reference
from restem_kernels.activation import gated_silu
from restem_kernels.kv_cache import rotate_and_write, write_kv
from restem_kernels.norm import add_rms_norm
from restem_kernels.work import Work
from torch import Tensor

Run = Callable[[int], object]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the results.

    Args:
        name: what is measured, the name of a kernel or of a limit of the machine.
        variant: ours, or what it is compared with.
        arguments: its shape.
        num_bytes: what one run reads and writes, each once.
        num_distinct_bytes: of those, where a run reads some again and again; None for all.
        num_flops: of a matrix product, else 0.
        resident: whether all runs take the same inputs, so that they stay in the L2 cache.
        build: takes how many sets of inputs to make; returns what runs once on set i.
    """

    name: str
    variant: str
    arguments: dict[str, object]
    num_bytes: int
    num_distinct_bytes: int | None = None
    num_flops: int = 0
    resident: bool = False
    build: Callable[[int], Run]


@dataclass(frozen=True, kw_only=True)
class Model:
    """The shapes of a model."""

    name: str
    hidden: int
    intermediate: int
    vocabulary: int
    num_heads: int
    num_key_heads: int
    head_size: int
    head_norms: bool = False

    @property
    def qkv_size(self) -> int:
        """Returns the width of queries, keys and values of a row side by side."""
        return (self.num_heads + 2 * self.num_key_heads) * self.head_size


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run on.

    Args:
        device: of all tensors.
        dtype: of all but lists.
        models: whose shapes.
        rows: sizes of the batch.
        attention_rows: the same, for attention.
        draw: rows and vocabulary of the draw.
        own_keys: tokens that each row has written itself.
        preamble: tokens that all rows share.
        question: tokens that the rows of one problem share.
        per_problem: rows of one problem.
        block_size: tokens in a cache block; divides preamble and question.
        split: keys of one piece at most.
        machine: bytes copied to measure the bandwidth, and bytes read again and again.
    """

    device: str
    dtype: torch.dtype
    models: tuple[Model, ...]
    rows: tuple[int, ...]
    attention_rows: tuple[int, ...]
    draw: tuple[int, int]
    own_keys: tuple[int, ...]
    preamble: int
    question: int
    per_problem: int
    block_size: int
    split: int
    machine: tuple[int, int]

    def random(self, *shape: int) -> Tensor:
        """Returns normal values."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def ints(self, values: object) -> Tensor:
        """Returns int32 on the device."""
        return torch.as_tensor(values, dtype=torch.int32).to(self.device)

    @property
    def item(self) -> int:
        """Returns the bytes of one element."""
        return self.dtype.itemsize


MODELS = (  # what matters most comes first, here and in the plan: time may run out
    Model(name="Qwen2.5-1.5B", hidden=1536, intermediate=8960, vocabulary=151936, num_heads=12,
          num_key_heads=2, head_size=128),
    Model(name="Qwen2.5-7B", hidden=3584, intermediate=18944, vocabulary=152064, num_heads=28,
          num_key_heads=4, head_size=128),
    Model(name="SmolLM2-135M", hidden=576, intermediate=1536, vocabulary=49152, num_heads=9,
          num_key_heads=3, head_size=64),
    Model(name="Qwen2.5-0.5B", hidden=896, intermediate=4864, vocabulary=151936, num_heads=14,
          num_key_heads=2, head_size=64),
    Model(name="Qwen3-1.7B", hidden=2048, intermediate=6144, vocabulary=151936, num_heads=16,
          num_key_heads=8, head_size=128, head_norms=True),
    Model(name="Llama-3-8B", hidden=4096, intermediate=14336, vocabulary=128256, num_heads=32,
          num_key_heads=8, head_size=128),
    Model(name="Gemma-3-1B", hidden=1152, intermediate=6912, vocabulary=262144, num_heads=4,
          num_key_heads=1, head_size=256, head_norms=True),
)  # fmt: skip
FULL = Plan(
    device="cuda", dtype=torch.bfloat16, models=MODELS, rows=(512, 256, 64, 1024),
    attention_rows=(512, 256), draw=(512, 151936), own_keys=(256, 128, 512),
    preamble=800, question=224, per_problem=32, block_size=32, split=512, machine=(2**30, 2**24),
)  # fmt: skip
# float16 where triton's interpreter runs the kernels: it would not round to bfloat16.
TINY = Plan(
    device="cpu", dtype=torch.float16,
    models=(Model(name="tiny", hidden=48, intermediate=80, vocabulary=300, num_heads=4,
                  num_key_heads=2, head_size=16, head_norms=True),),
    rows=(3,), attention_rows=(4,), draw=(3, 300), own_keys=(5,),
    preamble=32, question=16, per_problem=2, block_size=16, split=32, machine=(2**16, 2**12),
)  # fmt: skip


def compiled(function: Callable, plan: Plan, model: Model, rows: int) -> dict[str, Callable]:
    """Returns torch.compile of a function as a variant, of the first shape: it takes its time."""
    if plan.device == "cpu" or (model, rows) != (plan.models[0], plan.rows[0]):
        return {}
    return {"torch.compile": torch.compile(function, dynamic=False)}


def machine_cases(plan: Plan) -> Iterator[Case]:
    """Yields copy bandwidth, reads that hit the L2 cache, and the gap between graph nodes."""
    copied, read = plan.machine

    def copy(num_sets: int) -> Run:
        source, target = (
            torch.zeros(num_sets, copied, dtype=torch.uint8, device=plan.device) for _ in range(2)
        )
        return lambda i: target[i].copy_(source[i])

    def read_again(num_sets: int) -> Run:
        x = torch.zeros(read // 4096, 1024, device=plan.device)
        return lambda i: x.sum(1)

    def tiny(num_sets: int) -> Run:
        x = torch.zeros(1, device=plan.device)
        return lambda i: x.add_(1)

    yield Case(
        name="copy", variant="torch", arguments={"bytes": copied}, num_bytes=2 * copied, build=copy
    )
    yield Case(
        name="l2_read", variant="torch sum", arguments={"bytes": read}, num_bytes=read,
        resident=True, build=read_again,
    )  # fmt: skip
    yield Case(
        name="launch", variant="one element in a CUDA graph", arguments={}, num_bytes=8,
        resident=True, build=tiny,
    )  # fmt: skip


def matmul_cases(plan: Plan, model: Model, rows: int) -> Iterator[Case]:
    """Yields the matrix products of a decode step; bytes of the weight, input and output."""
    attended = model.num_heads * model.head_size
    shapes = {
        "qkv": (model.hidden, model.qkv_size),
        "attention output": (attended, model.hidden),
        "gate_up": (model.hidden, 2 * model.intermediate),
        "down": (model.intermediate, model.hidden),
        "head": (model.hidden, model.vocabulary),
    }

    def build(size: int, out: int, num_sets: int) -> Run:
        x, weight = plan.random(num_sets, rows, size), plan.random(num_sets, out, size)
        return lambda i: F.linear(x[i], weight[i])

    for projection, (size, out) in shapes.items() if rows >= 256 or len(plan.rows) == 1 else ():
        yield Case(
            name="matmul", variant="torch",
            arguments={"model": model.name, "projection": projection, "rows": rows},
            num_bytes=plan.item * (size * out + rows * (size + out)),
            num_flops=2 * rows * size * out, build=partial(build, size, out),
        )  # fmt: skip


def norm_cases(plan: Plan, model: Model, rows: int) -> Iterator[Case]:
    """Yields the residual sum and RMSNorm; 4 T E elements."""

    def sum_then_norm(x: Tensor, weight: Tensor, *, eps: float, residual: Tensor) -> object:
        total = x + residual
        return F.rms_norm(total, weight.shape, weight, eps), total

    def build(function: Callable, num_sets: int) -> Run:
        x, residual = plan.random(2, num_sets, rows, model.hidden)
        weight = plan.random(model.hidden)
        return lambda i: function(x[i], weight, eps=1e-6, residual=residual[i])

    variants = {
        "ours": add_rms_norm,
        "reference": reference.add_rms_norm,
        "sum, F.rms_norm": sum_then_norm,
        **compiled(reference.add_rms_norm, plan, model, rows),
    }
    for variant, function in variants.items():
        yield Case(
            name="add_rms_norm", variant=variant, arguments={"model": model.name, "rows": rows},
            num_bytes=4 * plan.item * rows * model.hidden, build=partial(build, function),
        )  # fmt: skip


def silu_cases(plan: Plan, model: Model, rows: int) -> Iterator[Case]:
    """Yields the gated activation; 3 T I elements."""

    def build(function: Callable, num_sets: int) -> Run:
        gate_up = plan.random(num_sets, rows, 2 * model.intermediate)
        return lambda i: function(gate_up[i])

    variants = {
        "ours": gated_silu,
        "reference": reference.gated_silu,
        **compiled(reference.gated_silu, plan, model, rows),
    }
    for variant, function in variants.items():
        yield Case(
            name="gated_silu", variant=variant, arguments={"model": model.name, "rows": rows},
            num_bytes=3 * plan.item * rows * model.intermediate, build=partial(build, function),
        )  # fmt: skip


def lists(plan: Plan, **given: object) -> Work:
    """Returns a work list of rows that attend to their own tables; given parts replace these."""
    nothing = {"tiles": [[0] * 7], "num_tiles": [0], "members": [0]}
    tensors = {name: plan.ints(value) for name, value in (nothing | given).items()}
    num_pieces = int(tensors.pop("num_pieces"))
    return Work(**tensors, attend_own=True, split=plan.split, num_pieces=num_pieces)


def writing_rows(plan: Plan, model: Model, rows: int) -> tuple[list[Tensor], Work]:
    """Returns caches with one block for each row, and the work of rows that write to their own."""
    shape = (1 + rows, model.num_key_heads, plan.block_size, model.head_size)
    caches = [torch.zeros(shape, device=plan.device, dtype=plan.dtype) for _ in range(2)]
    work = lists(
        plan, tables=[[1 + row] for row in range(rows)], positions=[64] * rows,
        own_tables=range(rows), own_starts=[64] * rows, num_shared=[0] * rows, num_pieces=1,
    )  # fmt: skip
    return caches, work


def rotate_cases(plan: Plan, model: Model, rows: int) -> Iterator[Case]:
    """Yields rotation and cache write; 2 T (H + 2 K) D elements and 2 T D of cos and sin."""

    def build(function: Callable, num_sets: int) -> Run:
        caches, work = writing_rows(plan, model, rows)
        works = [
            replace(work, positions=work.positions + i % plan.block_size) for i in range(num_sets)
        ]
        qkv = plan.random(num_sets, rows, model.qkv_size)
        cos, sin = plan.random(2, 256, model.head_size)
        weight = plan.random(model.head_size)
        norms = {"q_norm": weight, "k_norm": weight, "eps": 1e-6} if model.head_norms else {}
        return lambda i: function(qkv[i], cos, sin, *caches, works[i], **norms)

    elements = 2 * rows * (model.qkv_size + model.head_size)
    for variant, function in {
        "ours": rotate_and_write,
        "reference": reference.rotate_and_write,
    }.items():
        yield Case(
            name="rotate_and_write", variant=variant,
            arguments={"model": model.name, "rows": rows}, num_bytes=plan.item * elements,
            build=partial(build, function),
        )  # fmt: skip


def write_cases(plan: Plan, model: Model, rows: int) -> Iterator[Case]:
    """Yields the cache write alone; 4 T K D elements."""

    def build(function: Callable, num_sets: int) -> Run:
        caches, work = writing_rows(plan, model, rows)
        new = plan.random(num_sets, 2, rows, model.num_key_heads, model.head_size)
        return lambda i: function(*new[i], *caches, work)

    elements = 4 * rows * model.num_key_heads * model.head_size
    for variant, function in {"ours": write_kv, "reference": reference.write_kv}.items():
        yield Case(
            name="write_kv", variant=variant, arguments={"model": model.name, "rows": rows},
            num_bytes=plan.item * elements, build=partial(build, function),
        )  # fmt: skip
