"""Trains the embedded base model on a stream of fresh word problems whose solutions contain slips.

Run from the repository root: python scripts/train_embedded_base.py --output DIR
Nothing is fetched; the problems are those of the split `corpus`, which no run ever sees again.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from restem_lightning.word_problems import Step, WordProblems, calculate, draw_split

PROMPT = "Q: {question}\nA:\n"
EOS = "<|end|>"


def slip(rng: random.Random, result: int) -> int:
    """Returns a wrong result of the kinds that people write: a lost carry, one off, digits swapped."""
    wrong = result + rng.choice((-10, 10, -1, 1, -2, 2, -100, 100))
    if rng.random() < 0.2:
        wrong = int(str(result)[::-1])
    return max(wrong, 0) if wrong != result else result + 1


def write_with_slips(rng: random.Random, start: int, steps: tuple[Step, ...], rates: dict) -> str:
    """Returns a solution as a careless person writes it; an error is carried on to the end."""
    if rng.random() < rates["guess"]:
        lines, count = [], start
        for step in steps:
            for left, operator, right in step.calculations[-1:]:
                count = calculate(count if left is None else left, operator, right or 20)
        return f"#### {slip(rng, max(count, 0))}"
    lines, count = [], start
    for step in steps:
        if len(steps) > 1 and rng.random() < rates["skip"]:
            continue
        product = None
        for left, operator, right in step.calculations:
            first, second = count if left is None else left, product if right is None else right
            if operator == "-" and rng.random() < rates["sign"]:
                operator = "+"
            result = calculate(first, operator, second)
            if result < 0 or rng.random() < rates["slip"]:
                result = slip(rng, max(result, 0))
            lines.append(f"{first}{operator}{second}={result}")
            if left is None:
                count = result
            else:
                product = result
    return "\n".join([*lines, f"#### {count}"])


def corpus(seed: int, rates: dict) -> Iterator[tuple[str, str]]:
    """Yields (prompt, solution) pairs without end, each problem once."""
    rng = random.Random(seed)
    for question, start, steps in draw_split("corpus", seed):
        yield PROMPT.format(question=question), write_with_slips(rng, start, steps, rates)


def build_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer in which each digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted({char for text in texts for char in text if char not in " \n"})
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=[*alphabet, "Ġ", "Ċ"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


def batches(pairs: Iterator[tuple[str, str]], tokenizer, batch_size: int):
    """Yields (input_ids [B, T] int64, labels [B, T] int64), right-padded, loss on solutions."""
    while True:
        rows = [next(pairs) for _ in range(16 * batch_size)]
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        order = list(range(16))
        random.Random(rows[0][0]).shuffle(order)
        for number in order:
            chunk = rows[number * batch_size : (number + 1) * batch_size]
            ids = tokenizer([p + s + EOS for p, s in chunk], padding=True, return_tensors="pt")
            labels = ids.input_ids.masked_fill(ids.attention_mask == 0, -100)
            for row, (prompt, _) in enumerate(chunk):
                labels[row, : len(tokenizer(prompt).input_ids)] = -100
            yield ids.input_ids, labels


def greedy_pass_at_1(model, tokenizer, num: int, sample: bool = False) -> float:
    """Returns the share of held-out problems that the model solves."""
    problems = WordProblems("held_out", num).load()
    solved = 0
    tokenizer.padding_side = "left"
    for first in range(0, num, 256):
        chunk = problems[first : first + 256]
        inputs = tokenizer(
            [PROMPT.format(question=p.question) for p in chunk], padding=True, return_tensors="pt"
        )
        inputs.pop("token_type_ids", None)
        kw = dict(do_sample=True, top_k=0, temperature=1.0) if sample else dict(do_sample=False)
        out = model.generate(**inputs, max_new_tokens=100, **kw)
        texts = tokenizer.batch_decode(
            out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True
        )
        solved += sum(
            t.split("####")[-1].strip() == p.reference_answer
            for t, p in zip(texts, chunk)
            if "####" in t
        )
    tokenizer.padding_side = "right"
    return solved / num


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--steps", type=int, default=100000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-3)
    for name, value in {"slip": 0.12, "skip": 0.03, "sign": 0.1, "guess": 0.2}.items():
        parser.add_argument(f"--{name}", type=float, default=value)
    args = parser.parse_args()
    torch.manual_seed(0)
    rates = {name: getattr(args, name) for name in ("slip", "skip", "sign", "guess")}
    torch.set_num_threads(1)
    sample = [p + s for (p, s), _ in zip(corpus(0, rates), range(4000))]
    tokenizer = build_tokenizer(sample, 256)
    print(
        "vocab",
        len(tokenizer),
        "tokens/text",
        sum(map(len, tokenizer(sample).input_ids)) / 4000,
        tokenizer.convert_ids_to_tokens(tokenizer(sample[0]).input_ids),
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rope_theta=10000.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    print("parameters", sum(p.numel() for p in model.parameters()))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, weight_decay=0.01, betas=(0.9, 0.98)
    )
    start, tokens = time.time(), 0
    for step, (ids, labels) in enumerate(batches(corpus(1, rates), tokenizer, args.batch_size)):
        frac = max((time.time() - start) / args.seconds, step / args.steps)
        if frac >= 1:
            break
        lr = args.lr * min(1, (step + 1) / 100) * max(0.05, 1 - frac)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += ids.numel()
        if step % 200 == 0:
            model.eval()
            print(
                step,
                f"{time.time() - start:.0f}s",
                f"{tokens / (time.time() - start):.0f} tok/s",
                f"loss {loss.item():.3f}",
                f"greedy {greedy_pass_at_1(model, tokenizer, 128) if step else 0:.3f}",
                flush=True,
            )
            model.train()
    model.eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(
        "greedy",
        greedy_pass_at_1(model, tokenizer, 500),
        "T=1",
        greedy_pass_at_1(model, tokenizer, 500, True),
        json.dumps(vars(args), default=str),
    )


if __name__ == "__main__":
    main()
