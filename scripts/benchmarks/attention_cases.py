"""Cases of bench_kernels.py: attention of decode steps, and the draw.

The bytes of attention are those of the way it goes: over shared segments each segment is read once,
row by row a prompt is read again for every row. The latter may hit the L2 cache, so that its share
of the copy bandwidth can pass 1.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from kernel_cases import Case, Model, Plan, Run, lists
from restem_kernels.attention import block_attention, tile_rows
from restem_kernels.sampling import sample_tokens
from restem_kernels.work import Work
from torch import Tensor


def block_numbers(plan: Plan, rows: int, own: int) -> tuple[list[int], list, list]:
    """Returns the cache blocks of the preamble, of each problem's question and of each row."""
    counter = iter(range(1, sys.maxsize))

    def take(tokens: int) -> list[int]:
        return [next(counter) for _ in range(0, tokens, plan.block_size)]

    preamble = take(plan.preamble)
    questions = [take(plan.question) for _ in range(rows // plan.per_problem)]
    return preamble, questions, [take(own) for _ in range(rows)]


def filled(tables: list[list[int]]) -> list[list[int]]:
    """Returns tables of equal length."""
    width = max(map(len, tables))
    return [table + [0] * (width - len(table)) for table in tables]


def shared_work(plan: Plan, model: Model, rows: int, own: int) -> Work:
    """Returns the work of rows that attend to preamble and questions in tiles of several rows."""
    preamble, questions, owned = block_numbers(plan, rows, own)
    num_problems, most = len(questions), tile_rows(model.num_heads // model.num_key_heads)
    tiles, members, num_pieces = [], [], 0

    def add(table: int, start: int, length: int, segment_rows: range) -> None:
        for first in range(0, len(segment_rows), most):
            part = segment_rows[first : first + most]
            for piece, key in enumerate(range(0, length, plan.split), num_pieces):
                last = min(key + plan.split, length)
                tiles.append([len(members), len(part), table, start, key, last, piece])
            members.extend(part)

    add(0, 0, plan.preamble, range(rows))
    num_pieces += -(-plan.preamble // plan.split)
    for problem in range(num_problems):
        problem_rows = range(problem * plan.per_problem, (problem + 1) * plan.per_problem)
        add(1 + problem, plan.preamble, plan.question, problem_rows)
    num_pieces += -(-plan.question // plan.split)
    start = plan.preamble + plan.question
    return lists(
        plan, tiles=tiles, num_tiles=[len(tiles)], members=members,
        tables=filled([preamble, *questions, *owned]), positions=[start + own - 1] * rows,
        own_tables=[1 + num_problems + row for row in range(rows)], own_starts=[start] * rows,
        num_shared=[num_pieces] * rows, num_pieces=num_pieces - (-own // plan.split),
    )  # fmt: skip


def plain_work(plan: Plan, rows: int, own: int) -> Work:
    """Returns the work of rows that attend to everything on their own, in the same blocks."""
    preamble, questions, owned = block_numbers(plan, rows, own)
    length = plan.preamble + plan.question + own
    tables = [preamble + questions[row // plan.per_problem] + owned[row] for row in range(rows)]
    return lists(
        plan, tables=tables, positions=[length - 1] * rows, own_tables=range(rows),
        own_starts=[0] * rows, num_shared=[0] * rows, num_pieces=-(-length // plan.split),
    )  # fmt: skip


@functools.cache
def flash_attention_3() -> Callable | None:
    """Returns the FlashAttention 3 that vLLM ships, None where it cannot be imported."""
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError as error:
        print(f"no FlashAttention 3 to compare with (needs a vllm wheel): {error}")
        return None
    return flash_attn_varlen_func


def attention_cases(plan: Plan, model: Model, rows: int, own: int) -> Iterator[Case]:
    """Yields attention of one decode step, all rows with the same number of own keys."""
    length = plan.preamble + plan.question + own
    num_shared = plan.preamble + rows // plan.per_problem * plan.question
    head_shape, scaling = (model.num_key_heads, model.head_size), model.head_size**-0.5
    scale = {"scale": scaling, "enable_gqa": True}

    def ours(work_of: Callable[[], Work], num_sets: int) -> Run:
        work = work_of()
        num_blocks, size = 1 + int(work.tables.max()), plan.block_size
        queries = plan.random(num_sets, rows, model.num_heads, model.head_size)
        caches = plan.random(num_sets, 2, num_blocks, model.num_key_heads, size, model.head_size)
        return lambda i: block_attention(queries[i], *caches[i], work, scaling=scaling)

    def sdpa(num_sets: int) -> Run:
        queries = plan.random(num_sets, rows, model.num_heads, 1, model.head_size)
        keys, values = (
            plan.random(num_sets, rows, model.num_key_heads, length, model.head_size)
            for _ in range(2)
        )
        return lambda i: F.scaled_dot_product_attention(queries[i], keys[i], values[i], **scale)

    def fa3(num_sets: int) -> Run:
        tables = plain_work(plan, rows, own).tables
        queries = plan.random(num_sets, rows, model.num_heads, model.head_size)
        caches = plan.random(num_sets, 2, 1 + int(tables.max()), plan.block_size, *head_shape)
        settings = {
            "max_seqlen_q": 1, "cu_seqlens_q": plan.ints(range(rows + 1)), "max_seqlen_k": length,
            "seqused_k": plan.ints([length] * rows), "softmax_scale": scaling, "causal": True,
            "block_table": tables, "fa_version": 3,
        }  # fmt: skip
        return lambda i: flash_attention_3()(queries[i], *caches[i], **settings)

    variants = {
        "ours, shared": (partial(ours, partial(shared_work, plan, model, rows, own)), True),
        "ours, row by row": (partial(ours, partial(plain_work, plan, rows, own)), False),
        "sdpa, contiguous": (sdpa, False),
    }
    if plan.device == "cuda" and flash_attention_3() is not None:
        variants["FA3, row by row"] = (fa3, False)
    arguments = {"model": model.name, "rows": rows, "per_problem": plan.per_problem}
    arguments |= {"preamble": plan.preamble, "question": plan.question, "own": own}
    per_token = 2 * plan.item * model.num_key_heads * model.head_size
    outside = 2 * plan.item * rows * model.num_heads * model.head_size  # queries and output
    each_once = per_token * (num_shared + rows * own) + outside
    row_by_row = per_token * rows * length + outside
    for variant, (build, shared) in variants.items():
        yield Case(
            name="block_attention", variant=variant, arguments=arguments,
            num_bytes=each_once if shared else row_by_row,
            num_distinct_bytes=row_by_row if build is sdpa else each_once, build=build,
        )  # fmt: skip


def draw_cases(plan: Plan) -> Iterator[Case]:
    """Yields the draw from logits at temperature 0.7; they are read once."""
    rows, vocabulary = plan.draw

    def ours(top_k: int, num_sets: int) -> Run:
        logits = plan.random(num_sets, rows, vocabulary)
        key = torch.arange(2 * rows, device=plan.device).view(rows, 2)
        address = key, key[:, 0].contiguous(), key[:, 1].contiguous()
        return lambda i: sample_tokens(logits[i], *address, temperature=0.7, top_k=top_k)

    def plain(top_k: int, logprobs: bool, num_sets: int) -> Run:
        logits = plan.random(num_sets, rows, vocabulary)

        def draw(i: int) -> tuple[Tensor, ...]:
            values, token_ids = logits[i].topk(top_k) if top_k else (logits[i], None)
            tokens = (values.float() / 0.7).softmax(-1).multinomial(1)
            tokens = tokens if token_ids is None else token_ids.gather(1, tokens)
            if not logprobs:
                return (tokens,)
            return tokens, logits[i].float().log_softmax(-1).gather(1, tokens)

        return draw

    for top_k in (40, 0):
        first = "topk, " if top_k else ""
        variants = {
            "ours": partial(ours, top_k),
            f"{first}softmax, multinomial": partial(plain, top_k, False),
            f"{first}softmax, multinomial, log_softmax": partial(plain, top_k, True),
        }
        for variant, build in variants.items():
            yield Case(
                name="sample_tokens", variant=variant, num_bytes=plan.item * rows * vocabulary,
                arguments={"rows": rows, "vocabulary": vocabulary, "top_k": top_k}, build=build,
            )  # fmt: skip
