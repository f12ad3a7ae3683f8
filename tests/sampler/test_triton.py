"""The engine with the Triton kernels draws what it draws with torch.

Without a GPU the kernels run in Triton's interpreter, seconds a step: few tokens, then.
"""

import pytest
import torch

from restem_lightning.sampler import SamplingParams

ON_GPU = torch.cuda.is_available()
NUM_NEW = 40 if ON_GPU else 3


@pytest.fixture
def requests(make_requests):
    return make_requests(range(3, 51, 6)[: 8 if ON_GPU else 2], n=3)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"top_k": 20, "top_p": 0.9}),  # fused
        ("gemma2", {"top_k": 0}),  # as it is, with windows and softcapping
    ],
)
def test_triton_draws_the_completions_of_torch(
    family, settings, requests, make_policy, make_sampler, draw
):
    policy = make_policy(family, head_dim=16, num_hidden_layers=2)
    params = SamplingParams(n=3, temperature=1.0, max_new_tokens=NUM_NEW, **settings)
    expected = draw(make_sampler(policy, kernels="torch"), requests, params)
    sampler = make_sampler(
        policy,
        kernels="triton",
        device="cuda" if ON_GPU else "cpu",
        dtype="float32",
        max_batch_size=8,
    )
    got = draw(sampler, requests, params)
    assert expected.keys() == got.keys()
    for address, sample in expected.items():
        assert got[address].token_ids == sample.token_ids
        for name in ("logprobs", "sampling_logprobs"):
            one, other = (torch.tensor(getattr(s, name)) for s in (sample, got[address]))
            assert torch.allclose(one, other, atol=1e-4, rtol=0)
