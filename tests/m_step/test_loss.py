import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig

from restem_lightning.m_step.loss import Head, linear_cross_entropy

N, E, V = 13, 8, 50


def values(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, E), torch.randn(V, E)
    tensors = [hidden, weight, torch.randn(V) if bias else None]
    made = [None if t is None else t.to(dtype).requires_grad_() for t in tensors]
    return made, torch.randint(V, (N,)), torch.rand(N)


def whole(hidden, weight, bias, targets, factors, head):
    logits = head.scale * F.linear(hidden, weight, bias).float()
    if head.cap:
        logits = head.cap * torch.tanh(logits / head.cap)
    return (F.cross_entropy(logits, targets, reduction="none") * factors).sum()


@pytest.mark.parametrize("head", [Head(), Head(0.3), Head(cap=2.0), Head(0.5, 3.0)])
@pytest.mark.parametrize("chunk_logits", [1, 4 * V, 10_000])
@pytest.mark.parametrize("bias", [True, False])
def test_chunks_give_the_loss_and_gradients_of_all_logits_at_once(head, chunk_logits, bias):
    tensors, targets, factors = values(bias=bias)
    loss = linear_cross_entropy(*tensors, targets, factors, head=head, chunk_logits=chunk_logits)
    (3 * loss).backward()
    expected_tensors, _, _ = values(bias=bias)
    expected = whole(*expected_tensors, targets, factors, head)
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for tensor, other in zip(tensors, expected_tensors, strict=True):
        if tensor is not None:
            torch.testing.assert_close(tensor.grad, other.grad, rtol=1e-5, atol=3e-6)


def test_a_frozen_head_gets_no_gradient():
    (hidden, weight, _), targets, factors = values(bias=False)
    weight.requires_grad_(False)
    linear_cross_entropy(hidden, weight, None, targets, factors).backward()
    assert weight.grad is None
    assert hidden.grad.abs().sum() > 0


def test_no_targets_give_a_loss_of_zero_and_zero_gradients():
    (hidden, weight, _), targets, factors = values(bias=False)
    loss = linear_cross_entropy(hidden[:0], weight, None, targets[:0], factors[:0])
    loss.backward()
    assert loss.item() == 0
    assert not weight.grad.any()


def test_under_autocast_logits_are_bfloat16_and_gradients_are_the_weights_dtype():
    (hidden, weight, _), targets, factors = values(bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, None, targets, factors, chunk_logits=4 * V)
    loss.backward()
    rounded = F.linear(hidden.bfloat16(), weight.bfloat16()).float()
    expected = (F.cross_entropy(rounded, targets, reduction="none") * factors).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert weight.grad.dtype == hidden.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("family", "settings", "head"),
    [
        ("llama", {}, Head()),
        ("gemma2", {"final_logit_softcapping": 30.0}, Head(cap=30.0)),
        ("cohere", {"logit_scale": 0.25}, Head(0.25)),
        ("granite", {"logits_scaling": 4.0}, Head(0.25)),
    ],
)
def test_what_a_family_does_to_its_logits_is_read_off_its_config(family, settings, head):
    assert Head.of(AutoConfig.for_model(family, **settings)) == head
