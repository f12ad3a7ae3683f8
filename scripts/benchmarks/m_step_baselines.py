"""Times another trainer on an accepted dataset; runs under any interpreter that has it.

    python scripts/benchmarks/m_step_baselines.py trainer < workload.json
    path/to/python scripts/benchmarks/m_step_baselines.py trl < workload.json

trainer is transformers' Trainer with padded batches, trl is TRL's SFTTrainer with packing and its
loss on completions only. Both run AdamW (fused) and clip to norm 1. Standard input is one JSON
object: policy (folder), sequences (per optimizer step a list of [ids, prompt_length]),
micro_batch_tokens, dtype (float32, or bfloat16 for mixed precision), threads. The only line on
standard output is the result: tokens (of prompts and completions, no padding) and seconds of each
optimizer step, peak_memory_mb, versions.
"""

import importlib.metadata
import json
import os
import sys
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")


class Meter:
    """Counts real tokens per optimizer step and times the steps."""

    def __init__(self, torch):
        """Nothing is counted yet."""
        self.torch, self.tokens, self.seconds, self.now = torch, [0], [], 0.0

    def count(self, _, args, kwargs):
        """A forward pre-hook of the model."""
        mask, ids = kwargs.get("attention_mask"), kwargs["input_ids"]
        real = mask.sum().item() if mask is not None and mask.dim() == 2 else ids.numel()
        self.tokens[-1] += real

    def begin(self):
        """An optimizer step begins."""
        self.wait()
        self.now = time.perf_counter()

    def end(self):
        """It is done."""
        self.wait()
        self.seconds.append(time.perf_counter() - self.now)
        self.tokens.append(0)

    def wait(self):
        """Waits for the device."""
        if self.torch.cuda.is_available():
            self.torch.cuda.synchronize()


def peak_memory_mb(torch):
    """Returns the device's peak, or this process's own (its parent's would count in getrusage)."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20)
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1024)


def settings(work, rows, accumulate):
    """Returns what both trainers are told."""
    import torch

    return {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulate,
        "num_train_epochs": 1,
        "learning_rate": 1e-5,
        "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        "bf16": work["dtype"] == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "output_dir": tempfile.mkdtemp(),
    }


def make_trainer(name, work, model):
    """Returns the trainer, ready to run all steps."""
    import torch

    flat = [sequence for step in work["sequences"] for sequence in step]
    per_step = len(work["sequences"][0])
    longest = max(len(ids) for ids, _ in flat)
    rows = max(1, work["micro_batch_tokens"] // longest)
    if name == "trainer":
        from transformers import Trainer, TrainingArguments

        def collate(batch):
            width = max(len(ids) for ids, _ in batch)
            pad = lambda ids, value: [*ids, *[value] * (width - len(ids))]  # noqa: E731
            masked = [[-100] * prompt + ids[prompt:] for ids, prompt in batch]
            return {
                "input_ids": torch.tensor([pad(ids, 0) for ids, _ in batch]),
                "attention_mask": torch.tensor([pad([1] * len(ids), 0) for ids, _ in batch]),
                "labels": torch.tensor([pad(labels, -100) for labels in masked]),
            }

        rows = min(rows, per_step)
        arguments = TrainingArguments(**settings(work, rows, -(-per_step // rows)))
        return Trainer(model=model, args=arguments, train_dataset=flat, data_collator=collate)
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_dict(
        {
            "input_ids": [ids for ids, _ in flat],
            "completion_mask": [[0] * p + [1] * (len(ids) - p) for ids, p in flat],
        }
    )
    length = max(work["micro_batch_tokens"], longest)
    num_rows = max(1, per_step * sum(len(ids) for ids, _ in flat) // len(flat) // length)
    arguments = SFTConfig(
        **settings(work, 1, num_rows),
        max_length=length,
        packing=True,
        completion_only_loss=True,
        eos_token=None,
    )
    tokenizer = AutoTokenizer.from_pretrained(work["policy"])
    return SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)


def main():
    """Reads the workload, trains, writes one line."""
    name, work = sys.argv[1], json.load(sys.stdin)
    out, sys.stdout = sys.stdout, sys.stderr
    import torch
    from transformers import AutoModelForCausalLM, TrainerCallback

    torch.set_num_threads(work["threads"])
    model = AutoModelForCausalLM.from_pretrained(work["policy"], dtype=torch.float32)
    trainer, meter = make_trainer(name, work, model), Meter(torch)

    class Timer(TrainerCallback):
        def on_step_begin(self, *_, **__):
            meter.begin()

        def on_step_end(self, *_, **__):
            meter.end()

    trainer.add_callback(Timer())
    trainer.model.register_forward_pre_hook(meter.count, with_kwargs=True)
    trainer.train()
    result = {
        "tokens": meter.tokens[: len(meter.seconds)],
        "seconds": meter.seconds,
        "peak_memory_mb": peak_memory_mb(torch),
        "versions": {
            each: importlib.metadata.version(each)
            for each in ("torch", "transformers", *(["trl"] if name == "trl" else []))
        },
    }
    print(json.dumps(result), file=out)


if __name__ == "__main__":
    main()
