"""Tokens per second of our Sampler against other engines on one workload, and how near the limit.

    python scripts/benchmarks/bench_sampler.py --policy models/SmolLM2-135M-Instruct
    python scripts/benchmarks/bench_sampler.py --shape qwen2.5-1.5b --batch 512 --problems 64
    python scripts/benchmarks/bench_sampler.py --policy DIR --profile
    python scripts/benchmarks/bench_sampler.py --quick

The workload is that of an E-step: a few-shot preamble that all problems share, a question each, n
completions a problem, temperature 0.7, top-k 40. With --policy the prompts are GSM8K's format in
the policy's own tokens; with --shape the model has random weights and the prompts random tokens.
Completions have exactly --new-tokens tokens, or with --eos the lengths that the policy wrote, which
the other engines then get as the lengths to write. Ours runs in this process, each run of another
engine in a process of its own (baselines.py) on the same machine right after.

Beside tokens per second it reports the share of the limit that the measured copy bandwidth and
matrix rate of this machine allow (see `limit`), start-up and peak memory. Everything is appended
to results/bench_sampler.jsonl; --quick only shows that it runs.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from record import record
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile
from workloads import SHAPES, make_requests, save_random

from restem_lightning.loop.weights import release_memory
from restem_lightning.sampler import EngineParams, Request, Sampler, SamplingParams
from restem_lightning.sampler.generation import Generation


class Ours:
    """Our sampler on the workload."""

    def __init__(self, folder: Path, requests: list[Request], arguments: argparse.Namespace):
        """Loads the policy and draws a few tokens."""
        start = time.perf_counter()
        self.engine = EngineParams(
            dtype=arguments.dtype,
            max_batch_size=arguments.batch,
            batch_invariant=arguments.batch_invariant,
            cache_tokens=arguments.cache_tokens,
            kernels=arguments.kernels,
            threads=arguments.threads,
        )
        self.sampler = Sampler(folder, self.engine)
        self.startup_s = time.perf_counter() - start
        self.requests = requests
        self.lengths: dict[tuple[str, int], int] = {}
        self.tail_share = 0.0
        if not arguments.eos:
            self.sampler.eos_ids = ()
        self.params = SamplingParams(
            n=arguments.n, temperature=0.7, top_k=40, max_new_tokens=arguments.new_tokens
        )
        start = time.perf_counter()
        if self.sampler.device.type == "cuda":  # captures what will occur, all of it with --eos
            self.run(requests, iteration=0, most=None if arguments.eos else 4)
        else:
            few = replace(self.params, max_new_tokens=2)
            sum(1 for _ in self.sampler.generate(requests[:1], few, seed=0, iteration=0))
        self.warmup_s = time.perf_counter() - start

    def run(self, requests: list[Request], *, iteration: int, most: int | None = None) -> int:
        """Samples requests once and returns the number of tokens; at most some completions."""
        tokens, self.lengths = 0, {}
        start, ends = time.perf_counter(), []
        samples = self.sampler.generate(requests, self.params, seed=0, iteration=iteration)
        for count, sample in enumerate(samples, 1):
            tokens += len(sample.token_ids)
            self.lengths[sample.request_id, sample.index] = len(sample.token_ids)
            ends.append(time.perf_counter() - start)
            if count == most:
                break
        # What the last 5 % of the completions cost: those that end when few are left.
        self.tail_share = 1 - ends[int(0.95 * len(ends)) - 1] / ends[-1]
        return tokens

    def measure(self, repeat: int) -> float:
        """Returns the tokens per second of one run."""
        if self.sampler.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        tokens = self.run(self.requests, iteration=repeat)
        return tokens / (time.perf_counter() - start)


def measure_baseline(
    engine: str, folder: Path, ours: Ours, arguments: argparse.Namespace
) -> dict[str, object] | None:
    """Returns the result of another engine on the same prompts and lengths, None if it failed."""
    name, _, variant = engine.partition(":")
    lengths = [
        [ours.lengths[request.request_id, index] for index in request.indices]
        for request in ours.requests
    ]
    workload = {
        "policy": str(folder),
        "dtype": arguments.dtype,
        "prompts": [list(request.prompt_ids) for request in ours.requests],
        "n": arguments.n,
        "max_new_tokens": None if arguments.eos else arguments.new_tokens,
        "lengths": lengths if arguments.eos else None,
        "temperature": 0.7,
        "top_k": 40,
        "threads": arguments.threads,
        "repeats": 1,
        "max_batch_size": arguments.batch,
        "prefix_caching": variant != "unshared",
        "compile": variant != "eager",
    }
    if name.startswith("generate") and name != "generate_batch":
        # One prompt at a time, each as long as the other: a few tell the speed.
        few = max(1, arguments.generate_problems)
        workload["prompts"] = workload["prompts"][:few]
        workload["lengths"] = lengths[:few] if arguments.eos else None
    python = arguments.vllm_python if name == "vllm" else sys.executable
    script = Path(__file__).parent / "baselines.py"
    try:
        done = subprocess.run(
            [python, str(script), name],
            input=json.dumps(workload),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=arguments.engine_seconds,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"{engine}: no result ({error})", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def machine_rates(
    device: torch.device, dtype: torch.dtype, *, quick: bool = False
) -> tuple[float, float]:
    """Returns copy bandwidth in bytes/s (read plus write) and matrix rate in FLOP/s, measured.

    With quick of a small product: processors without bfloat16 take minutes for a large one.
    """
    on_gpu = device.type == "cuda"
    source = torch.ones((2**30 if on_gpu else 2**27) // 4, device=device)
    target = torch.empty_like(source)
    size = 256 if quick else 8192 if on_gpu else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def seconds(work) -> float:
        times = []
        for _ in range(6):
            if on_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    copy = 2 * source.numel() * 4 / seconds(lambda: target.copy_(source))
    return copy, 2 * size**3 / seconds(lambda: a @ b)


def limit(ours: Ours, bandwidth: float, flops: float) -> float:
    """Returns the tokens per second that bandwidth and matrix rate allow in steady state.

    A decode step of B sequences, N of each prompt, with a mean of L own tokens in the cache takes
    max(weights / bandwidth, 2 B parameters / rate) for the products and, one after the other, the
    time to read the shared keys once a group and the own keys once, and to write and read logits.
    """
    module, cache = ours.sampler.module, ours.sampler.cache
    embedding = module.get_input_embeddings().weight
    tied = module.get_output_embeddings().weight is embedding
    num = sum(parameter.numel() for parameter in module.parameters())
    num -= (
        0 if tied else embedding.numel()
    )  # the head is read, rows of the embedding only looked up
    element = embedding.element_size()
    batch = min(ours.sampler.max_batch_size, sum(len(r.indices) for r in ours.requests))
    per_token = 2 * len(cache.keys) * cache.head_shape[0] * cache.head_shape[1] * element
    own = sum(ours.lengths.values()) / len(ours.lengths) / 2
    prompts = [len(r.prompt_ids) - r.num_shared for r in ours.requests]
    groups = batch / len(ours.requests[0].indices)
    shared = ours.requests[0].num_shared + groups * sum(prompts) / len(prompts)
    products = max(num * element / bandwidth, 2 * batch * num / flops)
    keys = per_token * (batch * own + shared) / bandwidth
    logits = batch * embedding.shape[0] * 3 * element / bandwidth
    return batch / (products + keys + logits)


class _Enough(Exception):
    """Ends a profiled run."""


def profile(ours: Ours, *, skip: int = 8, count: int = 16) -> None:
    """Prints where the time of some decode steps in the middle of a run goes."""
    activities = [ProfilerActivity.CPU]
    on_gpu = ours.sampler.device.type == "cuda"
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
    traced = torch_profile(activities=activities)
    steps, start, decode = 0, 0.0, Generation._decode

    def counted(generation: Generation) -> None:
        nonlocal steps, start
        steps += 1
        if steps == skip:
            traced.start()
            start = time.perf_counter()
        if steps == skip + count:
            raise _Enough
        decode(generation)

    Generation._decode = counted
    try:
        for _ in ours.sampler.generate(ours.requests, ours.params, seed=0, iteration=99):
            pass
    except _Enough:
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        traced.stop()
    finally:
        Generation._decode = decode
    events = traced.key_averages()
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    print(events.table(sort_by=key, row_limit=25, max_name_column_width=60))
    print(f"{1000 * seconds / count:.2f} ms a step")
    if on_gpu:
        kernels = [event for event in events if event.device_type != DeviceType.CPU]
        busy = sum(event.self_device_time_total for event in kernels) / 1e6
        print(f"the device was busy {busy / seconds:.0%} of the time")


def parse() -> argparse.Namespace:
    """Returns the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--policy", type=Path, help="Hugging Face folder")
    what.add_argument("--shape", choices=SHAPES, help="random weights of this shape")
    what.add_argument("--quick", action="store_true", help="seconds, nothing recorded")
    parser.add_argument("--engines", nargs="*", default=["generate"], metavar="ENGINE",
                        help="generate, generate_static, generate_batch, vllm, vllm:unshared (no "
                        "prefix caching), vllm:eager (no compilation)")  # fmt: skip
    parser.add_argument("--vllm-python", help="interpreter that has vLLM", default=sys.executable)
    parser.add_argument("--engine-seconds", type=float, default=600, help="limit of another engine")
    parser.add_argument("--problems", type=int, default=4)
    parser.add_argument("--generate-problems", type=int, default=1,
                        help="problems given to generate, which takes them one by one")  # fmt: skip
    parser.add_argument("--preamble-tokens", type=int, default=900, help="with --shape")
    parser.add_argument("--question-tokens", type=int, default=100, help="with --shape")
    parser.add_argument("--n", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--eos", action="store_true", help="let the policy end its completions")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--cache-tokens", type=int, default=0, help="0: the engine's default")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--kernels", default="auto", choices=["auto", "c", "torch", "triton"])
    parser.add_argument("--batch-invariant", default="auto", choices=["auto", "on", "off"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--profile", action="store_true", help="print the profile of a few steps")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shape, arguments.preamble_tokens, arguments.question_tokens = "tiny", 20, 8
        arguments.n, arguments.new_tokens, arguments.problems = 4, 8, 2
        arguments.cache_tokens = arguments.cache_tokens or 4096
    return arguments


def main() -> None:
    """Runs every engine in turn, several times, prints a table and records it."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.policy or Path(name)
        if arguments.policy is None:
            save_random(arguments.shape, folder, dtype)
        requests = make_requests(arguments.policy, arguments)
        ours = Ours(folder, requests, arguments)
        if arguments.profile:
            profile(ours)
            return
        speeds = [ours.measure(repeat) for repeat in range(1, arguments.repeats + 1)]
        rates = machine_rates(ours.sampler.device, dtype, quick=arguments.quick)
        allowed = limit(ours, *rates)
        settings = describe(ours, rates, allowed, arguments)
        startup = {"startup_s": ours.startup_s, "warmup_s": ours.warmup_s}
        report("Sampler", speeds, startup, speeds, allowed, settings, arguments)
        # Other engines want most of the memory.
        del ours.sampler
        release_memory()
        for engine in arguments.engines:
            results = [
                measure_baseline(engine, folder, ours, arguments) for _ in range(arguments.repeats)
            ]
            if None not in results:
                rate = [result["tokens"] / result["seconds"][0] for result in results]
                report(engine, rate, results[-1], speeds, allowed, settings, arguments)


def describe(
    ours: Ours, rates: tuple[float, float], allowed: float, arguments: argparse.Namespace
) -> dict[str, object]:
    """Returns what is recorded of the workload and the machine."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()}
    for unneeded in ("engines", "vllm_python", "quick", "profile", "repeats", "engine_seconds"):
        del settings[unneeded]
    settings |= {
        "policy": arguments.policy.name if arguments.policy else None,
        "prompt_tokens": len(ours.requests[0].prompt_ids),
        "shared_tokens": ours.requests[0].num_shared,
        "mean_length": round(sum(ours.lengths.values()) / len(ours.lengths), 1),
        "tail_share": round(ours.tail_share, 3),
        "copy_gb_per_s": round(rates[0] / 1e9, 1),
        "matmul_tflops": round(rates[1] / 1e12, 3),
        "limit_tokens_per_s": round(allowed, 1),
    }
    print(
        f"mean length {settings['mean_length']}, the last 5 % of completions took "
        f"{ours.tail_share:.0%} of the time"
    )
    return settings


def report(
    engine: str,
    speeds: list[float],
    detail: dict[str, object],
    ours: list[float],
    allowed: float,
    settings: dict[str, object],
    arguments: argparse.Namespace,
) -> None:
    """Prints an engine's line and records it."""
    median, base = statistics.median(speeds), statistics.median(ours)
    print(
        f"{engine:20} {median:10,.0f} tokens/s  {median / allowed:6.1%} of the limit  "
        f"ours is {base / median:5.2f}x  start-up {detail['startup_s']:.1f} s + "
        f"{detail['warmup_s']:.1f} s"
    )
    if not arguments.quick:
        extra = {k: detail[k] for k in ("startup_s", "warmup_s", "versions") if k in detail}
        record("bench_sampler", engine, settings | {"engine": extra}, speeds, "tokens/s")


if __name__ == "__main__":
    main()
