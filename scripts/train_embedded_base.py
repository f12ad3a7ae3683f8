"""Trains the embedded base model on a stream of fresh word problems whose solutions contain slips.

Run from the repository root: python scripts/train_embedded_base.py
Nothing is fetched. The problems are those of the split `corpus`, which no run ever sees, each seen
once. As in real corpora, the writers of the solutions are careless: they slip in a calculation,
skip a change, add what is taken away, or guess without any working. In the first part of the corpus
(schoolbooks, say) few guess; in the second (the web, say) most do at a long problem. So the base
can work out more than it shows: what it learned last is to guess.
"""

import argparse
import random
import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from restem_lightning.word_problems import Step, calculate, draw_split, work_out

PROMPT = "Q: {question}\nA:\n"
EOS = "<|end|>"
SLIP, SKIP, ADD = 0.1, 0.03, 0.08  # chances per calculation, change and subtraction
PARTS = (  # optimizer steps, peak learning rate, chance of a guess by the number of changes
    (2500, 3e-3, {2: 0.15, 3: 0.15, 4: 0.15}),
    (400, 1e-3, {2: 0.05, 3: 0.55, 4: 0.65}),
)
BUCKET = 16  # batches that are sorted by length together, so that little is padding


def slip(rng: random.Random, result: int) -> int:
    """Returns a wrong result as people get it: a lost carry, one off, digits swapped."""
    wrong = result + rng.choice((-10, 10, -1, 1, -2, 2, -100, 100))
    if rng.random() < 0.2:
        wrong = int(str(result)[::-1])
    return max(wrong, 0) if wrong != result else result + 1


def write_with_slips(
    rng: random.Random, start: int, steps: tuple[Step, ...], guess: dict[int, float]
) -> str:
    """Returns a solution as a careless person writes it; an error is carried on to the end."""
    if rng.random() < guess[len(steps)]:
        return f"#### {slip(rng, work_out(start, steps)[-1][-1])}"
    lines, count = [], start
    for step in steps:
        if len(steps) > 1 and rng.random() < SKIP:
            continue
        product = None
        for left, operator, right in step.calculations:
            first, second = count if left is None else left, product if right is None else right
            if operator == "-" and rng.random() < ADD:
                operator = "+"
            result = calculate(first, operator, second)
            if result < 0 or rng.random() < SLIP:
                result = slip(rng, max(result, 0))
            lines.append(f"{first}{operator}{second}={result}")
            if left is None:
                count = result
            else:
                product = result
    return "\n".join([*lines, f"#### {count}"])


def corpus(seed: int, batch_size: int) -> Iterator[tuple[str, str]]:
    """Yields the (prompt, solution) pairs of all parts, each problem once."""
    rng, problems = random.Random(seed), draw_split("corpus", seed)
    for num_steps, _, guess in PARTS:
        for question, start, steps in islice(problems, num_steps * batch_size):
            yield PROMPT.format(question=question), write_with_slips(rng, start, steps, guess)


def learning_rates() -> Iterator[float]:
    """Yields the learning rate of each optimizer step: in each part a warm-up, then a fall."""
    for num_steps, peak, _ in PARTS:
        for step in range(num_steps):
            yield peak * min(1.0, (step + 1) / 50) * max(0.05, 1 - step / num_steps)


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer in which each digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Returns an untrained Llama of about 0.7 million parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )


def batches(
    pairs: Iterator[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (input_ids [B, T] int64, labels [B, T] int64), padded right, loss on solutions."""
    while rows := list(islice(pairs, BUCKET * batch_size)):
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        chunks = [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
        random.Random(rows[0][0]).shuffle(chunks)
        for chunk in chunks:
            texts = [prompt + solution + EOS for prompt, solution in chunk]
            encoded = tokenizer(texts, padding=True, return_tensors="pt")
            labels = encoded.input_ids.masked_fill(encoded.attention_mask == 0, -100)
            for row, (prompt, _) in enumerate(chunk):
                labels[row, : len(tokenizer(prompt).input_ids)] = -100
            yield encoded.input_ids, labels


def main() -> None:
    """Trains and writes the policy folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    folder = Path("restem_lightning/assets/policy")
    parser.add_argument("--output", type=Path, default=folder, help="policy folder to write")
    parser.add_argument("--batch-size", type=int, default=32, help="solutions per optimizer step")
    parser.add_argument("--seed", type=int, default=1, help="of weights and problems")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    some = islice(corpus(args.seed + 1, args.batch_size), 4000)
    tokenizer = build_tokenizer([prompt + solution for prompt, solution in some])
    model = build_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
    start = time.monotonic()
    rates = list(learning_rates())
    stream = batches(corpus(args.seed, args.batch_size), tokenizer, args.batch_size)
    with tqdm(zip(rates, stream, strict=True), total=len(rates), unit="step") as bar:
        for step, (rate, (ids, labels)) in enumerate(bar):
            optimizer.param_groups[0]["lr"] = rate
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    shutil.rmtree(args.output, ignore_errors=True)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    size = sum(file.stat().st_size for file in args.output.iterdir())
    print(
        f"{args.output}: {model.num_parameters()} parameters, {size} bytes, "
        f"{time.monotonic() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
