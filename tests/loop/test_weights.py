"""The weights that D_val is measured with are those in training, or the M-step ends."""

import pytest
import torch

from restem_lightning.loop.weights import hand_over
from restem_lightning.m_step.module import load_policy
from restem_lightning.sampler import EngineParams, Request, Sampler, SamplingParams
from restem_lightning.settings import EMBEDDED_POLICY

ENGINE = EngineParams(device="cpu", max_batch_size=8, cache_tokens=4096)


class ForgetfulSampler(Sampler):
    """Keeps its old weights for one parameter."""

    def update_weights(self, named):
        own = dict(self.module.named_parameters())
        kept = "model.norm.weight"
        super().update_weights((name, own[kept] if name == kept else new) for name, new in named)


def trained():
    """The embedded policy after an optimizer step."""
    model = load_policy(str(EMBEDDED_POLICY))
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return model


def greedy(sampler):
    request = Request(request_id="r", prompt_ids=tuple(range(4, 16)))
    params = SamplingParams(n=1, temperature=0.0, max_new_tokens=8)
    (sample,) = sampler.generate([request], params, seed=0, iteration=0)
    return sample.logprobs


def test_the_next_completion_is_drawn_with_the_weights_handed_over():
    sampler = Sampler(EMBEDDED_POLICY, ENGINE)
    before = greedy(sampler)
    hand_over(trained(), sampler)
    after = greedy(sampler)
    assert after != before
    hand_over(load_policy(str(EMBEDDED_POLICY)), sampler)
    assert greedy(sampler) == before


def test_one_stale_parameter_ends_the_m_step():
    sampler = ForgetfulSampler(EMBEDDED_POLICY, ENGINE)
    hand_over(load_policy(str(EMBEDDED_POLICY)), sampler)
    with pytest.raises(RuntimeError, match="does not hold the weights that are being trained"):
        hand_over(trained(), sampler)
