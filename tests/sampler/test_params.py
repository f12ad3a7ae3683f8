"""Sampling settings and addresses."""

import pytest

from restem_lightning.errors import UserError
from restem_lightning.sampler import Request, SamplingParams
from restem_lightning.sampler.params import address_key


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, r"sampling\.n \(0\) must be at least 1"),
        ({"temperature": -0.1}, r"sampling\.temperature \(-0\.1\) must be at least 0"),
        ({"temperature": float("nan")}, r"sampling\.temperature \(nan\) must be at least 0"),
        ({"top_k": -1}, r"sampling\.top_k \(-1\) must be at least 0"),
        ({"top_p": 0}, r"sampling\.top_p \(0\) must be above 0 and at most 1"),
        ({"top_p": 1.1}, r"sampling\.top_p \(1\.1\)"),
        ({"min_p": 1.0}, r"sampling\.min_p \(1\.0\) must be at least 0 and below 1"),
        ({"max_new_tokens": 0}, r"sampling\.max_new_tokens \(0\) must be at least 1"),
        ({"max_new_tokens": 2**31}, r"sampling\.max_new_tokens .* below 2\*\*31"),
        ({"stop": ("a", "")}, r"sampling\.stop holds an empty string"),
        ({"n": 2, "temperature": 0}, r"sampling\.n \(2\) must be 1 at temperature 0"),
    ],
)
def test_sampling_settings_are_checked(settings, message):
    with pytest.raises(UserError, match=message):
        SamplingParams(**settings)


def test_a_list_of_stop_strings_becomes_a_tuple():
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_requests_with_nothing_to_do_are_refused():
    with pytest.raises(UserError, match="request q has no tokens"):
        Request(request_id="q", prompt_ids=())
    with pytest.raises(UserError, match="request q has no indices"):
        Request(request_id="q", prompt_ids=(1,), indices=())


def test_address_keys_are_fixed_forever():
    assert address_key(0, 1, "gsm8k/12") == address_key(0, 1, "gsm8k/12")
    keys = {address_key(s, i, r) for s in (0, 1) for i in (1, 2) for r in ("a", "b", "1")}
    assert len(keys) == 12
    # Old runs are resumed by drawing again: this value must never change.
    assert address_key(0, 1, "a") == (3042631266, 2302046666)
