"""The engine with the C functions draws what it draws with torch, and does without them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from restem_lightning.sampler import SamplingParams

PARAMS = SamplingParams(n=4, temperature=1.0, top_k=20, top_p=0.97, max_new_tokens=40)
ROOT = Path(__file__).parents[2]
NO_COMPILER = """
import sys, torch
from restem_lightning.sampler import EngineParams, Sampler
for _ in range(2):
    sampler = Sampler(sys.argv[1], EngineParams(device="cpu"))
print(sampler.ops.__name__)
Sampler(sys.argv[1], EngineParams(device="cpu", kernels="c"))
"""


@pytest.fixture
def requests(make_requests):
    return make_requests(range(1, 46, 9))


# Llama's layers are fused; the others call attention behind transformers' interface.
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text"])
def test_both_draw_the_same_tokens(family, requests, make_policy, make_sampler, draw):
    policy = make_policy(family)
    expected = draw(make_sampler(policy, kernels="torch"), requests, PARAMS)
    got = draw(make_sampler(policy, kernels="c"), requests, PARAMS)
    for address, sample in expected.items():
        assert got[address].token_ids == sample.token_ids
        for mine, theirs in zip(got[address].logprobs, sample.logprobs, strict=True):
            assert mine == pytest.approx(theirs, abs=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_torch_a_subset_draws_the_same_completions(
    dtype, requests, make_policy, make_sampler, draw
):
    sampler = make_sampler(make_policy(), kernels="torch", dtype=dtype)
    whole = draw(sampler, requests, PARAMS)
    for address, sample in draw(sampler, [requests[3], requests[1]], PARAMS).items():
        assert whole[address] == sample


@pytest.fixture(scope="module")
def without_compiler(make_policy):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, "-c", NO_COMPILER, str(make_policy())],
        env=os.environ | {"PYTHONPATH": path, "CC": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_without_a_compiler_the_sampler_says_so_once_and_uses_torch(without_compiler):
    assert without_compiler.stdout.strip() == "restem_kernels.cpu"
    said = [line for line in without_compiler.stderr.splitlines() if "compiler" in line]
    assert said[0].startswith("sampling in torch alone")
    assert not any(line.startswith("sampling") for line in said[1:])


def test_c_without_a_compiler_is_refused(without_compiler):
    assert without_compiler.returncode == 1
    last = without_compiler.stderr.strip().splitlines()[-1]
    assert last.startswith("restem_lightning.errors.UserError: engine.kernels is c, but")
