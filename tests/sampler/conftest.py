"""Tiny policies of several families, and one way to run a sampler on them."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from restem_lightning.sampler import EngineParams, Request, Sampler

VOCAB = 64
EOS = 1
FAMILIES = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 6},
    "gemma2": {
        "head_dim": 8,
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 20.0,
    },
    "gemma3_text": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_policy(tmp_path_factory):
    """Returns a function that writes a tiny random policy once and gives its folder."""
    folders = {}

    def make(family="llama", seed=0, **settings):
        name = "-".join([family, str(seed), *map(str, settings.values())])
        if name in folders:
            return folders[name]
        config = AutoConfig.for_model(
            family,
            **{
                "hidden_size": 32,
                "num_hidden_layers": 3,
                "intermediate_size": 48,
                "vocab_size": VOCAB,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
                "eos_token_id": EOS,
                "bos_token_id": 0,
                "pad_token_id": 0,
                "tie_word_embeddings": False,
            }
            | FAMILIES.get(family, {})
            | settings,
        )
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for name_of, parameter in model.named_parameters():
            if parameter.ndim > 1:
                # Random logits must differ enough that greedy completions vary.
                parameter.data.normal_(0, 1.0 if "embed" in name_of else 0.2)
        folders[name] = tmp_path_factory.mktemp("policy") / name
        model.save_pretrained(folders[name])
        return folders[name]

    return make


@pytest.fixture
def make_sampler():
    """Returns a function that builds a sampler with small blocks."""

    def make(policy, **settings):
        defaults = {"device": "cpu", "block_size": 8, "max_batch_size": 16, "cache_tokens": 2048}
        return Sampler(policy, EngineParams(**(defaults | settings)))

    return make


@pytest.fixture
def draw():
    """Returns a function that samples all requests and gives completions by (id, index)."""

    def run(sampler, requests, params, *, seed=0, iteration=1, decode=None):
        samples = list(
            sampler.generate(requests, params, seed=seed, iteration=iteration, decode=decode)
        )
        by_address = {(sample.request_id, sample.index): sample for sample in samples}
        assert len(by_address) == len(samples)
        return by_address

    return run


@pytest.fixture
def prompt():
    """Returns a function that makes random prompt ids."""

    def make(length, seed=0):
        generator = torch.Generator().manual_seed(1000 * length + seed)
        return tuple(torch.randint(2, VOCAB, (length,), generator=generator).tolist())

    return make


@pytest.fixture
def make_requests(prompt):
    """Returns a function that makes requests p0, p1, ... behind one preamble."""

    def make(lengths, preamble=13, n=4):
        """Makes one for each length of a question; n is the same for all, or a list."""
        counts = [n] * len(lengths) if isinstance(n, int) else n
        return [
            Request(
                request_id=f"p{number}",
                prompt_ids=(*prompt(preamble), *prompt(length)),
                num_shared=preamble,
                indices=tuple(range(count)),
            )
            for number, (length, count) in enumerate(zip(lengths, counts, strict=True))
        ]

    return make
