import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from transformers import AutoConfig

from restem_lightning.errors import UserError
from restem_lightning.m_step import PolicyModule
from restem_lightning.m_step.loss import target_factors, weighted_loss
from restem_lightning.m_step.optimization import clip_gradients, learning_rate_factor
from restem_lightning.m_step.packing import TrainingSequence, pack_step
from restem_lightning.m_step.probe import check_packing
from restem_lightning.m_step.weights import load_policy

EOS = 1


def random_sequences(count=9, seed=0):
    rng = np.random.default_rng(seed)
    return [
        TrainingSequence(rng.integers(2, 64, size).astype(np.int32), int(size) // 2, 1.0)
        for size in rng.integers(6, 14, count)
    ]


def step_loss(model, sequences, loss_norm="token", tokens_per_micro_batch=64, **packing):
    batch = pack_step(sequences, tokens_per_micro_batch=tokens_per_micro_batch, **packing)
    model.zero_grad()
    total = 0.0
    for micro_batch in batch.micro_batches:
        part = weighted_loss(model, micro_batch, target_factors(micro_batch, batch, loss_norm))
        part.backward()
        total += part.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


def token_nlls(model, sequence):
    """Negative log-likelihood of each completion token, one sequence at a time."""
    ids = torch.tensor(sequence.ids, dtype=torch.int64)[None]
    with torch.no_grad():
        logprobs = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    return [
        -logprobs[at - 1, ids[0, at]].item() for at in range(sequence.prompt_length, ids.shape[1])
    ]


def test_token_norm_is_the_mean_over_completion_tokens(make_policy):
    model, sequences = load_policy(make_policy()), random_sequences()
    nlls = [nll for sequence in sequences for nll in token_nlls(model, sequence)]
    assert step_loss(model, sequences)[0] == pytest.approx(np.mean(nlls), rel=1e-5)


def test_sequence_norm_is_the_weighted_mean_of_sequence_means(make_policy):
    model, sequences = load_policy(make_policy()), random_sequences(3)
    sequences = [s._replace(weight=w) for s, w in zip(sequences, (2.0, 0.5, 1.0), strict=True)]
    means = [np.mean(token_nlls(model, sequence)) for sequence in sequences]
    expected = (2.0 * means[0] + 0.5 * means[1] + 1.0 * means[2]) / 3
    assert step_loss(model, sequences, "sequence")[0] == pytest.approx(expected, rel=1e-5)


def test_weights_scale_the_gradient_and_weight_zero_leaves_a_sequence_out(make_policy):
    model, sequences = load_policy(make_policy()), random_sequences(4)
    _, plain = step_loss(model, sequences[:3])
    _, doubled = step_loss(model, [s._replace(weight=2.0) for s in sequences[:3]])
    _, without = step_loss(model, [*sequences[:3], sequences[3]._replace(weight=0.0)])
    for name, gradient in plain.items():
        torch.testing.assert_close(doubled[name], 2 * gradient)
        torch.testing.assert_close(without[name], gradient)


def test_eos_is_supervised(make_policy):
    model = load_policy(make_policy())
    ids = np.array([5, 6, 7, EOS], dtype=np.int32)
    (nll_7, nll_eos) = token_nlls(model, TrainingSequence(ids, 2, 1.0))
    loss, _ = step_loss(model, [TrainingSequence(ids, 2, 1.0)])
    assert loss == pytest.approx((nll_7 + nll_eos) / 2, rel=1e-5)


def test_prompt_tokens_are_context_and_never_targets(make_policy):
    model = load_policy(make_policy())
    head = model.get_output_embeddings().weight
    loss, _ = step_loss(model, [TrainingSequence(np.array([5, 6, 7, 8], np.int32), 3, 1.0)])
    # The only target is 8: each other row of the LM head is pushed down, a target's row up along
    # the one hidden state; a supervised prompt token would show as a second direction.
    assert torch.linalg.matrix_rank(head.grad, rtol=1e-4) == 1
    other, _ = step_loss(model, [TrainingSequence(np.array([5, 9, 7, 8], np.int32), 3, 1.0)])
    assert other != pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma2", "gemma3_text"])
def test_packed_rows_give_the_loss_and_gradients_of_single_sequences(make_policy, family):
    model, sequences = load_policy(make_policy(family)), random_sequences()
    packed_loss, packed = step_loss(model, sequences)
    single_loss, single = 0.0, {}
    tokens = sum(s.completion_length for s in sequences)
    for sequence in sequences:
        share = sequence.completion_length / tokens
        loss, gradients = step_loss(model, [sequence])
        single_loss += share * loss
        single = {name: single.get(name, 0) + share * g for name, g in gradients.items()}
    assert packed_loss == pytest.approx(single_loss, rel=1e-5)
    for name, gradient in single.items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def related_sequences():
    """Completions of few prompts, which all begin with one preamble longer than any window."""
    rng = np.random.default_rng(0)
    preamble, sequences = rng.integers(2, 64, 37), []
    for num_completions in (3, 1, 2):
        question = rng.integers(2, 64, rng.integers(1, 20))
        for _ in range(num_completions):
            parts = preamble, question, rng.integers(2, 64, rng.integers(1, 9))
            ids = np.concatenate(parts).astype(np.int32)
            sequences.append(TrainingSequence(ids, len(ids) - len(parts[2]), float(rng.random())))
    return [*sequences, TrainingSequence(rng.integers(2, 64, 9).astype(np.int32), 4, 1.0)]


@pytest.mark.parametrize("loss_norm", ["token", "sequence"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma2", "gemma3_text"])
def test_shared_prompts_give_the_loss_and_gradients_of_unshared_ones(
    make_policy, family, loss_norm
):
    model, sequences = load_policy(make_policy(family)), related_sequences()
    size = {"tokens_per_micro_batch": 10_000}
    plain_loss, plain = step_loss(model, sequences, loss_norm, shared_prompts=False, **size)
    shared_loss, shared = step_loss(model, sequences, loss_norm, shared_prompts=True, **size)
    assert shared_loss == pytest.approx(plain_loss, rel=1e-6)
    for name, gradient in plain.items():
        torch.testing.assert_close(shared[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("bloom", {"n_layer": 2}, "attention interface"),
        ("mamba", {"num_hidden_layers": 2}, "attention interface"),
        ("lfm2", {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}, "conv"),
    ],
)
def test_a_family_whose_attention_cannot_be_replaced_is_refused_by_name(
    tmp_path, family, settings, message
):
    AutoConfig.for_model(family, **settings).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"does not support .*ForCausalLM: .*{message}"):
        load_policy(str(tmp_path))


def test_a_policy_that_leaks_between_packed_sequences_is_refused(make_policy):
    model = load_policy(make_policy())
    check_packing(model, torch.device("cpu"))
    inner = model.base_model.forward
    model.base_model.forward = lambda *args, packed=None, **rest: inner(*args, **rest)
    with pytest.raises(UserError, match=r"LlamaForCausalLM.* mixes packed sequences"):
        check_packing(model, torch.device("cpu"))


def test_a_policy_with_unknown_logits_is_refused(make_policy):
    model = load_policy(make_policy())
    model.lm_head.register_forward_hook(lambda module, args, logits: logits * 2)
    with pytest.raises(UserError, match=r"LlamaForCausalLM.* logits"):
        check_packing(model, torch.device("cpu"))


def test_one_micro_batch_of_eight_trains_like_eight_of_one(make_policy, make_accepted, fit):
    policy, accepted = make_policy(), make_accepted()
    wide, wide_losses, _ = fit(policy, accepted, data={"tokens_per_micro_batch": 4096})
    narrow, narrow_losses, _ = fit(policy, accepted, data={"tokens_per_micro_batch": 1})
    np.testing.assert_allclose(wide_losses, narrow_losses, rtol=1e-5)
    assert wide_losses[-1] < 0.9 * wide_losses[0]
    for left, right in zip(wide.parameters(), narrow.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)


def test_global_step_counts_optimizer_steps(make_policy, make_accepted, fit):
    _, losses, trainer = fit(make_policy(), make_accepted(), data={"tokens_per_micro_batch": 1})
    assert trainer.global_step == len(losses) == 6


def test_a_second_fit_with_a_fresh_module_starts_from_the_same_weights(
    make_policy, make_accepted, fit
):
    policy, accepted = make_policy(), make_accepted()
    _, first, _ = fit(policy, accepted)
    _, second, _ = fit(policy, accepted)
    assert first == second
    assert len(second) == 6


def test_activation_checkpointing_changes_no_loss(make_policy, make_accepted, fit):
    policy, accepted = make_policy(), make_accepted()
    _, plain, _ = fit(policy, accepted, max_epochs=1)
    _, saved, _ = fit(policy, accepted, max_epochs=1, module={"activation_checkpointing": True})
    np.testing.assert_allclose(plain, saved, rtol=1e-6)


@pytest.mark.parametrize(
    ("module", "trainer"), [({}, {"precision": "bf16-mixed"}), ({"dtype": "bfloat16"}, {})]
)
def test_bfloat16_paths_follow_float32(make_policy, make_accepted, fit, module, trainer):
    policy, accepted = make_policy(), make_accepted()
    _, exact, _ = fit(policy, accepted, max_epochs=1)
    fitted, rounded, _ = fit(policy, accepted, max_epochs=1, module=module, **trainer)
    np.testing.assert_allclose(exact, rounded, rtol=0.03)
    expected = torch.bfloat16 if module else torch.float32
    assert {p.dtype for p in fitted.parameters()} == {expected}


def test_dropout_of_the_config_is_switched_off(make_policy):
    policy = make_policy()
    config = AutoConfig.from_pretrained(policy)
    config.attention_dropout = 0.5
    config.save_pretrained(policy)
    model = load_policy(policy)
    assert model.training
    assert model.config.attention_dropout == 0.0
    assert model.model.layers[0].self_attn.attention_dropout == 0.0


def test_clipping_is_by_the_global_norm():
    parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip_gradients(parameters, None).item() == 5.0
    assert clip_gradients(parameters, 1.0).item() == 5.0
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.6, 0.0]))
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0.8]))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_learning_rate_warms_up_then_follows_the_schedule(schedule, expected):
    factors = [
        learning_rate_factor(step, warmup_steps=2, total_steps=6, schedule=schedule)
        for step in range(6)
    ]
    assert factors == pytest.approx(expected)


def test_the_optimizer_steps_with_the_scheduled_learning_rate(make_policy, make_accepted, fit):
    used = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            used.append({group["lr"] for group in trainer.optimizers[0].param_groups})

    module = {"learning_rate": 1e-2, "warmup_fraction": 1 / 3, "schedule": "linear"}
    fit(make_policy(), make_accepted(), module=module, callbacks=[Watch()])
    expected = [0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025]
    assert [rate for (rate,) in used] == pytest.approx(expected)


def test_settings_that_cannot_work_are_refused(make_policy, make_accepted, fit):
    with pytest.raises(UserError, match="schedule"):
        PolicyModule("policy", schedule="step")
    with pytest.raises(UserError, match="learning_rate"):
        PolicyModule("policy", learning_rate=0.0)
    with pytest.raises(UserError, match="max_epochs"):
        fit(make_policy(), make_accepted(), max_epochs=-1)


def test_a_gradient_that_is_not_finite_stops_the_m_step(make_policy, make_accepted, fit):
    with pytest.raises(UserError, match="finite"):
        fit(make_policy(), make_accepted(), module={"learning_rate": 1e30, "warmup_fraction": 0.0})


@pytest.mark.slow
def test_compiled_layers_change_no_loss(make_policy, make_accepted, fit):
    policy, accepted = make_policy(), make_accepted()
    _, plain, _ = fit(policy, accepted, max_epochs=1)
    _, compiled, _ = fit(policy, accepted, max_epochs=1, module={"compile": True})
    np.testing.assert_allclose(plain, compiled, rtol=1e-5)


def test_a_policy_that_lacks_a_weight_is_not_trained_from_made_up_ones(make_policy):
    policy = make_policy()
    config = AutoConfig.from_pretrained(policy)
    config.num_hidden_layers = 3
    config.save_pretrained(policy)
    with pytest.raises(UserError, match=r"lacks model\.layers\.2"):
        load_policy(str(policy))
