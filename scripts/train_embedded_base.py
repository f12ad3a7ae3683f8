"""Trains an embedded base model on a stream of fresh problems whose solutions contain slips.

Run from the repository root: python scripts/train_embedded_base.py [--domain functions]
Nothing is fetched. The problems are those of the split `corpus`, which no run ever sees, each seen
once. As in real corpora, the writers of the solutions are careless: they slip in a calculation or a
line, skip a change, take the opposite, or hurry: guess an answer, or write only what a function
returns. In the first part of the corpus (schoolbooks, say) few hurry; in the second (the web, say)
most do at a long problem. So the base can work out more than it shows: what it learned last is to
hurry.
"""

import argparse
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from restem_lightning.problems import functions, words
from restem_lightning.problems.functions import STEPS, Task, write_program
from restem_lightning.problems.words import Step, calculate, work_out

PROMPT = "Q: {question}\nA:\n"
EOS = "<|end|>"
ASSETS = Path("restem_lightning/assets")
# Chances of a slip per calculation or number of a line, of a skip per change, and of the opposite
# per change that has one (adding for taking away).
SLIP, SKIP, OPPOSITE = 0.1, 0.03, 0.08
OPPOSITES = ((" == 0", " == 1"), (" > ", " < "), (" + ", " - "), ("[:{k}]", "[-{k}:]"))
BUCKET = 16  # batches that are sorted by length together, so that little is padding


def slip(rng: random.Random, result: int) -> int:
    """Returns a wrong result as people get it: a lost carry, one off, digits swapped."""
    wrong = result + rng.choice((-10, 10, -1, 1, -2, 2, -100, 100))
    if rng.random() < 0.2:
        wrong = int(str(result)[::-1])
    return max(wrong, 0) if wrong != result else result + 1


def write_working(
    rng: random.Random, hurry: dict[int, float], start: int, steps: tuple[Step, ...]
) -> str:
    """Returns a worked solution as a careless person writes it; an error goes on to the end."""
    if rng.random() < hurry[len(steps)]:
        return f"#### {slip(rng, work_out(start, steps)[-1][-1])}"
    lines, count = [], start
    for step in steps:
        if len(steps) > 1 and rng.random() < SKIP:
            continue
        product = None
        for left, operator, right in step.calculations:
            first, second = count if left is None else left, product if right is None else right
            if operator == "-" and rng.random() < OPPOSITE:
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


def write_careless_program(
    rng: random.Random,
    hurry: dict[int, float],
    task: Task,
    name: str,
    argument: str,
    inputs: list[list[int]],
) -> str:
    """Returns a program as a careless person writes it."""
    if rng.random() < hurry[len(task.steps)]:
        return write_program(replace(task, steps=()), name, argument)
    opposite_of, steps = opposite_kinds(), []
    for kind, k in task.steps:
        if rng.random() < SKIP:
            continue
        if kind in opposite_of and rng.random() < OPPOSITE:
            kind = opposite_of[kind]
        if k and rng.random() < SLIP:
            k += rng.choice((-1, 1))
        steps.append((kind, k))
    return write_program(replace(task, steps=tuple(steps)), name, argument)


@cache
def opposite_kinds() -> dict[int, int]:
    """Returns for each kind of step that has an opposite the kind that it is mistaken for."""
    kind_of = {expression: kind for kind, (_, expression) in enumerate(STEPS)}
    both_ways = [*OPPOSITES, *(pair[::-1] for pair in OPPOSITES)]
    return {
        kind: kind_of[opposite]
        for expression, kind in kind_of.items()
        for one, other in both_ways
        if (opposite := expression.replace(one, other)) != expression and opposite in kind_of
    }


@dataclass(frozen=True, kw_only=True)
class Domain:
    """A kind of problem, and how people write about it.

    Args:
        folder: of the policy, in the package's assets.
        draw: yields (question, ...) of a split by a seed; the rest goes to `write`, which takes the
            chance of a hurried solution by the number of steps.
        batch_size: solutions per optimizer step.
        parts: optimizer steps, peak learning rate and these chances of each part of the corpus.
    """

    folder: str
    draw: Callable[[str, int], Iterator[tuple]]
    write: Callable[..., str]
    batch_size: int
    parts: tuple[tuple[int, float, dict[int, float]], ...]


DOMAINS = {
    "words": Domain(
        folder="policy",
        draw=words.draw_split,
        write=write_working,
        batch_size=32,
        parts=(
            (2500, 3e-3, {2: 0.15, 3: 0.15, 4: 0.15}),
            (400, 1e-3, {2: 0.05, 3: 0.55, 4: 0.65}),
        ),
    ),
    "functions": Domain(
        folder="code_policy",
        draw=functions.draw_split,
        write=write_careless_program,
        batch_size=16,
        parts=(
            (2000, 3e-3, {2: 0.15, 3: 0.15, 4: 0.15}),
            (400, 1e-3, {2: 0.05, 3: 0.55, 4: 0.65}),
        ),
    ),
}


def corpus(domain: Domain, seed: int) -> Iterator[tuple[str, str]]:
    """Yields the (prompt, solution) pairs of all parts, each problem once."""
    rng, problems = random.Random(seed), domain.draw("corpus", seed)
    for num_steps, _, hurry in domain.parts:
        for question, *rest in islice(problems, num_steps * domain.batch_size):
            yield PROMPT.format(question=question), domain.write(rng, hurry, *rest)


def learning_rates(domain: Domain) -> Iterator[float]:
    """Yields the learning rate of each optimizer step: in each part a warm-up, then a fall."""
    for num_steps, peak, _ in domain.parts:
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
    parser.add_argument("--domain", choices=DOMAINS, default="words", help="kind of problem")
    parser.add_argument("--output", type=Path, help="policy folder to write; else the package's")
    parser.add_argument("--seed", type=int, default=1, help="of weights and problems")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    args = parser.parse_args()
    domain = DOMAINS[args.domain]
    output = args.output or ASSETS / domain.folder
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    some = islice(corpus(domain, args.seed + 1), 4000)
    tokenizer = build_tokenizer([prompt + solution for prompt, solution in some])
    model = build_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
    start = time.monotonic()
    rates = list(learning_rates(domain))
    stream = batches(corpus(domain, args.seed), tokenizer, domain.batch_size)
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
    shutil.rmtree(output, ignore_errors=True)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    size = sum(file.stat().st_size for file in output.iterdir())
    print(
        f"{output}: {model.num_parameters()} parameters, {size} bytes, "
        f"{time.monotonic() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
