"""Tokens per second of our Sampler against transformers' generate, in one process, taking turns.

    python scripts/benchmarks/bench_sampler.py --policy models/SmolLM2-135M-Instruct
    python scripts/benchmarks/bench_sampler.py --quickstart
    python scripts/benchmarks/bench_sampler.py --quick

With --policy: prompts of about 115 tokens (one example, then a question), 32 completions each of
exactly 128 tokens (EOS is ignored, so that all do equal work), temperature 0.7, top-k 40; a batch
of 64 is two such prompts, one of 128 four. With --quickstart: a tiny random model writes 300 x 8
completions of up to 60 tokens. Both append to results/bench_sampler.jsonl; --quick only shows in
seconds that everything runs. One model is in memory at a time.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from record import record
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from restem_lightning.sampler import EngineParams, Request, Sampler, SamplingParams

# Name, arguments, and what loads a model and returns a function that runs once.
Case = tuple[str, dict, Callable[[], Callable[[], int]]]
EXAMPLE = """Question: A baker fills 4 trays with 12 rolls each and sells 30 of them before noon. \
How many rolls are left?
Answer: There are 4 * 12 = 48 rolls. After noon 48 - 30 = 18 are left. #### 18

"""
QUESTIONS = (
    "A gardener plants 15 tulips on each of 6 days and then gives a third of them to a friend. "
    "How many tulips does the gardener keep?",
    "A train has 8 cars with 40 seats each, and 75 seats are empty when it leaves the station. "
    "How many people sit in the train?",
    "Lena reads 24 pages a day for 5 days and 36 pages on each of the next 2 days of her week. "
    "How many pages does she read in all?",
    "A shop buys 9 boxes of 20 candles for 2 dollars a candle and sells every one for 3 dollars. "
    "What is the profit of the shop?",
)


def tiny_model(vocab_size: int) -> LlamaForCausalLM:
    """Returns a random Llama of the quickstart's size."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    return LlamaForCausalLM(config)


def prompts(policy: Path | None) -> list[tuple[int, ...]]:
    """Returns the four prompts, in the policy's tokens or, without one, in bytes."""
    texts = [f"{EXAMPLE}Question: {question}\nAnswer:" for question in QUESTIONS]
    if policy is None:
        return [tuple(text.encode()[-115:]) for text in texts]
    tokenizer = AutoTokenizer.from_pretrained(policy)
    return [tuple(tokenizer(text).input_ids) for text in texts]


def ours(
    folder: Path,
    requests: list[Request],
    params: SamplingParams,
    engine: EngineParams,
    *,
    eos: bool,
) -> Callable[[], int]:
    """Returns a function that samples all requests once and returns the number of tokens."""
    sampler = Sampler(folder, engine)
    if not eos:
        sampler.eos_ids = ()

    def run() -> int:
        samples = sampler.generate(requests, params, seed=0, iteration=0)
        return sum(len(sample.token_ids) for sample in samples)

    return run


def transformers_generate(
    folder: Path, prompt: tuple[int, ...], params: SamplingParams, dtype: str
) -> Callable[[], int]:
    """Returns a function that lets transformers write params.n completions of one prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def run() -> int:
        ids = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=True,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            max_new_tokens=params.max_new_tokens,
            num_return_sequences=params.n,
        )
        return ids[:, len(prompt) :].numel()

    return run


def gsm8k_cases(
    folder: Path,
    policy: Path | None,
    *,
    n: int,
    max_new_tokens: int,
    batches: list[int],
    dtypes: list[str],
) -> Iterator[Case]:
    """Yields the cases of the first workload."""
    params = SamplingParams(n=n, max_new_tokens=max_new_tokens)
    all_ids = prompts(policy)
    common = {"model": policy.name if policy else "tiny", "prompt_tokens": len(all_ids[0])}
    common |= {"n": n, "new_tokens": max_new_tokens, "temperature": 0.7, "top_k": 40}
    for dtype in dtypes:
        build = partial(transformers_generate, folder, all_ids[0], params, dtype)
        yield "transformers generate", common | {"dtype": dtype, "batch": n}, build
        for batch in batches:
            requests = [
                Request(request_id=str(index), prompt_ids=ids, indices=tuple(range(n)))
                for index, ids in enumerate(all_ids[: max(1, batch // n)])
            ]
            engine = EngineParams(dtype=dtype, max_batch_size=batch, cache_tokens=256 * batch)
            build = partial(ours, folder, requests, params, engine, eos=False)
            yield "Sampler", common | {"dtype": dtype, "batch": batch}, build


def quickstart_cases(folder: Path) -> Iterator[Case]:
    """Yields the cases of the second workload."""
    generator = torch.Generator().manual_seed(0)
    requests = [
        Request(
            request_id=str(index),
            prompt_ids=tuple(
                torch.randint(3, 200, (30 + index % 20,), generator=generator).tolist()
            ),
            indices=tuple(range(8)),
        )
        for index in range(300)
    ]
    params = SamplingParams(n=8, temperature=1.0, top_k=0, max_new_tokens=60)
    for batch in (64, 128, 256):
        engine = EngineParams(dtype="float32", max_batch_size=batch)
        build = partial(ours, folder, requests, params, engine, eos=True)
        yield "Sampler quickstart", {"model": "tiny", "dtype": "float32", "batch": batch}, build


def measure(build: Callable[[], Callable[[], int]]) -> float:
    """Returns the tokens per second of one run; loading is not timed, the model goes afterwards."""
    run = build()
    start = time.perf_counter()
    return run() / (time.perf_counter() - start)


def main() -> None:
    """Runs every case in turn, several times, prints a table and records it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", type=Path, help="Hugging Face folder")
    parser.add_argument("--quick", action="store_true", help="tiny random model, nothing recorded")
    parser.add_argument("--quickstart", action="store_true", help="the workload of the quickstart")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="more only on an idle machine")
    arguments = parser.parse_args()
    if not (arguments.policy or arguments.quick or arguments.quickstart):
        parser.error("give --policy DIR, --quick or --quickstart")
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.policy or Path(name)
        if arguments.policy is None:
            tiny_model(256 if arguments.quick else 200).save_pretrained(folder)
        if arguments.quickstart:
            cases = list(quickstart_cases(folder))
        elif arguments.quick:
            cases = list(
                gsm8k_cases(
                    folder,
                    None,
                    n=4,
                    max_new_tokens=8,
                    batches=[32],
                    dtypes=arguments.dtypes,
                )
            )
        else:
            cases = list(
                gsm8k_cases(
                    folder,
                    arguments.policy,
                    n=32,
                    max_new_tokens=128,
                    batches=arguments.batches,
                    dtypes=arguments.dtypes,
                )
            )
        speeds: list[list[float]] = [[] for _ in cases]
        for _ in range(arguments.repeats):
            for speed, (case, settings, build) in zip(speeds, cases, strict=True):
                speed.append(measure(build))
                print(f"... {case} {settings['dtype']} {settings['batch']}: {speed[-1]:.0f}")
    baseline = max(speeds[0])
    for speed, (case, settings, _) in zip(speeds, cases, strict=True):
        median, best = statistics.median(speed), max(speed)
        print(
            f"{case:22} {settings['dtype']:9} batch {settings['batch']:4} {median:8.0f} tokens/s "
            f"(best {best:.0f}, {best / baseline:.1f}x of the first line)"
        )
        if not arguments.quick:
            record("bench_sampler", case, settings, speed, "tokens/s")


if __name__ == "__main__":
    main()
