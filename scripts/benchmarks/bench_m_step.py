"""Training tokens per second of our M-step against TRL and a plain Trainer on the same data.

    python scripts/benchmarks/bench_m_step.py --policy models/SmolLM2-135M-Instruct
    python scripts/benchmarks/bench_m_step.py --shape qwen2.5-1.5b --batch 128 --trl-python PYTHON
    python scripts/benchmarks/bench_m_step.py --quick

The data are those of an M-step on GSM8K: a few-shot preamble that all prompts share, a question,
a completion (shuffled, an optimizer step seldom has two of one problem). Tokens are those of
prompts and completions, whatever a trainer shares or pads, so that tokens/s compare. Each trainer
runs in a process of its own, one right after the other: ours (PolicyModule under Lightning's
Trainer), ours without shared prompts, TRL's SFTTrainer with packing, transformers' Trainer. The
first optimizer step is warm-up.

MFU is 6 FLOP per weight of the decoder and token that went through it, and per weight of the LM
head and target, against the matrix rate that this machine reached right before. Float32 on a CPU,
bf16-mixed on a GPU. Everything is appended to results/bench_m_step.jsonl; --quick only shows that
it runs.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from bench_sampler import machine_rates
from m_step_baselines import peak_memory_mb
from record import record
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from workloads import SHAPES, save_random

from restem_lightning.m_step import AcceptedDataModule, LoraParams, PolicyModule
from restem_lightning.m_step.weights import empty_policy

ENGINES = ("shared", "unshared", "trl", "trainer")


def make_sequences(arguments: argparse.Namespace, vocab: int) -> list[list[tuple[list[int], int]]]:
    """Returns per optimizer step its sequences: ids and the length of the prompt."""
    rng = np.random.default_rng(0)
    preamble = rng.integers(2, vocab, arguments.preamble_tokens).tolist()
    steps = []
    for _ in range(arguments.steps):
        step = []
        while len(step) < arguments.batch:
            prompt = preamble + rng.integers(2, vocab, arguments.question_tokens).tolist()
            for _ in range(min(arguments.per_problem, arguments.batch - len(step))):
                least, most = arguments.completion_tokens
                completion = rng.integers(2, vocab, rng.integers(least, most + 1)).tolist()
                step.append((prompt + completion, len(prompt)))
        steps.append(step)
    return steps


def save_tokenizer(folder: Path) -> None:
    """Saves a tokenizer that nothing is tokenized with; trainers want one."""
    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)


class Timer(pl.Callback):
    """Times optimizer steps and counts the tokens that went through the model."""

    def __init__(self) -> None:
        """Nothing is counted yet."""
        self.seconds, self.num_tokens, self.num_targets = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """An optimizer step begins."""
        self.num_tokens.append(sum(m.input_ids.numel() for m in batch.micro_batches))
        self.num_targets.append(sum(m.target_ids.numel() for m in batch.micro_batches))
        self.now = self._clock()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """It is done."""
        self.seconds.append(self._clock() - self.now)

    @staticmethod
    def _clock() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def run_ours(work: dict) -> dict:
    """Trains as the loop does and returns what the baselines return, and the share computed."""
    torch.set_num_threads(work["threads"])
    folder = Path(tempfile.mkdtemp())
    flat = [sequence for step in work["sequences"] for sequence in step]
    table = {
        "prompt_ids": pa.array([ids[:prompt] for ids, prompt in flat], pa.list_(pa.int32())),
        "completion_ids": pa.array([ids[prompt:] for ids, prompt in flat], pa.list_(pa.int32())),
        "weight": pa.array([1.0] * len(flat), pa.float32()),
    }
    pq.write_table(pa.table(table), folder / "accepted.parquet")
    data = AcceptedDataModule(
        str(folder / "accepted.parquet"),
        batch_size=len(work["sequences"][0]),
        tokens_per_micro_batch=work["micro_batch_tokens"],
        shared_prompt_packing=work["shared"],
    )
    timer, on_gpu = Timer(), torch.cuda.is_available()
    trainer = pl.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=1,
        precision="bf16-mixed" if work["dtype"] == "bfloat16" else "32-true",
        max_epochs=1,
        callbacks=[timer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=folder,
    )
    lora = LoraParams() if work["lora"] else None
    trainer.fit(PolicyModule(work["policy"], compile=work["compile"], lora=lora), data)
    mean = statistics.mean(len(ids) for ids, _ in flat)
    return {
        "tokens": [mean * len(step) for step in work["sequences"]],  # shuffled over the steps
        "seconds": timer.seconds,
        "model_tokens": timer.num_tokens,
        "targets": timer.num_targets,
        "peak_memory_mb": peak_memory_mb(torch),
    }


def measure(engine: str, work: dict, arguments: argparse.Namespace) -> dict | None:
    """Runs a trainer in a process of its own; None, with a line, if it gives no result."""
    script, python = "m_step_baselines.py", sys.executable
    if engine in ("shared", "unshared"):
        script, work = "bench_m_step.py", {**work, "shared": engine == "shared"}
    if engine == "trl":
        python = arguments.trl_python
    command = [python, str(Path(__file__).with_name(script)), "--worker", engine]
    if script == "m_step_baselines.py":
        command.remove("--worker")
    try:
        done = subprocess.run(
            command, input=json.dumps(work), stdout=subprocess.PIPE, text=True, check=True,
            timeout=arguments.engine_seconds,
        )  # fmt: skip
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"{engine}: no result ({error})", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def num_weights(policy: str) -> tuple[int, int]:
    """Returns how many weights the decoder's matrices and the LM head have."""
    model = empty_policy(policy, torch.float32)
    head = model.get_output_embeddings().weight.numel()
    layers = [p.numel() for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2]
    return sum(layers), head


def report(
    engine: str, result: dict, rate: float, weights: tuple[int, int], settings: dict, quick: bool
) -> float:
    """Prints and records an engine's line; returns its tokens/s."""
    speeds = [t / s for t, s in zip(result["tokens"][1:], result["seconds"][1:], strict=True)]
    derived = {"engine_memory_mb": result["peak_memory_mb"]}
    through = result.get("model_tokens", result["tokens"])[1:]
    # The others' logits are not known to be of targets only; their MFU is as if they were.
    targets = settings["targets_per_step"]
    flops = [6 * (weights[0] * each + weights[1] * targets) for each in through]
    used = [f / s / rate for f, s in zip(flops, result["seconds"][1:], strict=True)]
    derived |= {"mfu": round(statistics.median(used), 3)}
    derived |= {"model_token_share": round(sum(through) / sum(result["tokens"][1:]), 3)}
    middle = statistics.median(speeds)
    print(
        f"{engine:10} {middle:12,.1f} tokens/s   MFU {derived['mfu']:.1%}   through the model "
        f"{derived['model_token_share']:.0%}   peak {result['peak_memory_mb']:,} MB"
    )
    if not quick:
        settings = settings | {"versions": result.get("versions")}
        record("bench_m_step", engine, settings, speeds, "tokens/s", derived=derived)
    return middle


def parse() -> argparse.Namespace:
    """Returns the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", help="Hugging Face folder")
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES, help="random weights")
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter that has trl")
    parser.add_argument("--preamble-tokens", type=int, default=506)
    parser.add_argument("--question-tokens", type=int, default=80)
    parser.add_argument("--completion-tokens", type=int, nargs=2, default=(100, 200))
    parser.add_argument("--per-problem", type=int, default=1, help="completions of a problem")
    parser.add_argument("--batch", type=int, default=64, help="sequences of an optimizer step")
    parser.add_argument(
        "--steps", type=int, default=4, help="optimizer steps, the first unmeasured"
    )
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--compile", action="store_true", help="ours with model.compile")
    parser.add_argument("--lora", action="store_true", help="ours with adapters (7B on one GPU)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--engine-seconds", type=int, default=900)
    parser.add_argument("--quick", action="store_true", help="tiny, nothing recorded")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shape, arguments.micro_batch_tokens = "tiny", 700
        arguments.batch, arguments.steps, arguments.preamble_tokens = 4, 2, 40
    return arguments


def main() -> None:
    """Runs every trainer in turn, prints a table and records it."""
    arguments = parse()
    if arguments.worker:
        work, out, sys.stdout = json.load(sys.stdin), sys.stdout, sys.stderr
        print(json.dumps(run_ours(work)), file=out)
        return
    torch.set_num_threads(arguments.threads)
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    with tempfile.TemporaryDirectory() as name:
        policy = arguments.policy or name
        if arguments.policy is None:
            save_random(arguments.shape, Path(name), torch.float32)
            save_tokenizer(Path(name))
        weights = num_weights(policy)
        vocab = json.loads((Path(policy) / "config.json").read_text())["vocab_size"]
        steps = make_sequences(arguments, vocab)
        work = {
            "policy": policy,
            "sequences": steps,
            "micro_batch_tokens": arguments.micro_batch_tokens,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": arguments.threads,
            "compile": arguments.compile,
            "lora": arguments.lora,
        }
        _, rate = machine_rates(torch.device("cuda" if on_gpu else "cpu"), dtype)
        settings = {k: v for k, v in vars(arguments).items() if k not in _UNRECORDED}
        settings["policy"] = arguments.policy and Path(arguments.policy).name
        flat = [sequence for step in steps for sequence in step]
        settings["targets_per_step"] = sum(len(ids) - p for ids, p in flat) / len(steps)
        settings |= {"dtype": work["dtype"], "matmul_tflops": round(rate / 1e12, 3)}
        speeds = {}
        for engine in arguments.engines:
            if (result := measure(engine, work, arguments)) is not None:
                speeds[engine] = report(engine, result, rate, weights, settings, arguments.quick)
        if "shared" in speeds:
            ratios = [f"{speeds['shared'] / v:.2f}x {k}" for k, v in speeds.items()]
            print(f"ours is {', '.join(ratios[1:])}")


_UNRECORDED = ("engines", "trl_python", "quick", "worker", "engine_seconds", "policy")

if __name__ == "__main__":
    main()
