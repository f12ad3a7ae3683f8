"""Models and prompts of the sampler's benchmarks."""

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from restem_lightning.loop.weights import release_memory
from restem_lightning.problems import Problem
from restem_lightning.prompts import FewShotPrompt, encode_prompt
from restem_lightning.sampler import Request

# Layers, hidden size, intermediate size, query heads, key heads, head size, vocabulary, tied.
SHAPES = {
    "tiny": ("llama", 2, 64, 128, 4, 2, 16, 512, True),
    "smollm2-135m": ("llama", 30, 576, 1536, 9, 3, 64, 49152, True),
    "qwen2.5-0.5b": ("qwen2", 24, 896, 4864, 14, 2, 64, 151936, True),
    "qwen2.5-1.5b": ("qwen2", 28, 1536, 8960, 12, 2, 128, 151936, True),
    "qwen2.5-7b": ("qwen2", 28, 3584, 18944, 28, 4, 128, 152064, False),
    "qwen3-1.7b": ("qwen3", 28, 2048, 6144, 16, 8, 128, 151936, True),
    "llama-3-8b": ("llama", 32, 4096, 14336, 32, 8, 128, 128256, False),
    "gemma-3-1b": ("gemma3_text", 26, 1152, 6912, 4, 1, 256, 262144, True),
}
QUESTION = (
    "A shop buys {} boxes of {} candles for 2 dollars a candle and sells every one for {} dollars. "
    "On the next day it gives {} candles away. What is the profit of the shop?"
)


def save_random(shape: str, folder: Path, dtype: torch.dtype) -> None:
    """Saves a model of a shape with random weights."""
    family, layers, hidden, inner, heads, key_heads, head_size, vocab, tied = SHAPES[shape]
    config = AutoConfig.for_model(
        family,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=head_size,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
        eos_token_id=1,
        bos_token_id=0,
        pad_token_id=0,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    del model
    release_memory()


def make_requests(policy: Path | None, arguments: argparse.Namespace) -> list[Request]:
    """Returns the workload's prompts, each with its completions."""
    indices = tuple(range(arguments.n))
    if policy is None:
        generator = torch.Generator().manual_seed(0)
        vocab = SHAPES[arguments.shape][-2]
        draw = lambda n: tuple(torch.randint(2, vocab, (n,), generator=generator).tolist())  # noqa: E731
        preamble = draw(arguments.preamble_tokens)
        prompts = [
            (preamble + draw(arguments.question_tokens), len(preamble))
            for _ in range(arguments.problems)
        ]
    else:
        tokenizer = AutoTokenizer.from_pretrained(policy)
        template = FewShotPrompt(shots="gsm8k_4shot.jsonl")
        prompts = []
        for number in range(arguments.problems):
            text = QUESTION.format(9 + number, 20 + 3 * number, 3 + number % 5, 7 * number)
            problem = Problem(problem_id=str(number), question=text, reference_answer="0")
            prompts.append(encode_prompt(template, problem, tokenizer))
    return [
        Request(request_id=str(number), prompt_ids=tuple(ids), num_shared=shared, indices=indices)
        for number, (ids, shared) in enumerate(prompts)
    ]
