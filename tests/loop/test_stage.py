"""What a stage makes of what the sampler has drawn."""

import shutil
from dataclasses import replace

import pytest
from transformers import AutoTokenizer, GenerationConfig

from restem_lightning.loop.stage import eos_ids, load_policy
from restem_lightning.prompts import ChatPrompt, FewShotPrompt
from restem_lightning.sampler import EngineParams, Sample
from restem_lightning.settings import EMBEDDED_POLICY


@pytest.fixture(scope="module")
def policy():
    return load_policy(str(EMBEDDED_POLICY), EngineParams(device="cpu", cache_tokens=4096))


def sample(token_ids, **values):
    zeros = (0.0,) * len(token_ids)
    return Sample(
        request_id="p", index=0, token_ids=tuple(token_ids), logprobs=zeros,
        sampling_logprobs=zeros, finish_reason="stop", **values,
    )  # fmt: skip


@pytest.mark.parametrize("num_beyond", [0, 1, 3])
def test_the_text_ends_where_the_stop_string_begins(policy, num_beyond):
    text = "She has 5 apples and 7 pears."
    ids = policy.tokenizer.encode(text)
    assert policy.text_of(sample(ids, num_beyond=num_beyond)) == text[: len(text) - num_beyond]


def test_spaces_before_punctuation_stay_whatever_the_tokenizer_tidies_up(policy):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_POLICY)
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    tidying = replace(policy, tokenizer=tokenizer)
    assert tidying.decode(tokenizer.encode("a . b , c")) == "a . b , c"


def test_an_answer_ends_as_the_chat_template_ends_a_turn_where_a_policy_has_several_ends(tmp_path):
    folder = str(shutil.copytree(EMBEDDED_POLICY, tmp_path / "policy"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (end_of_turn,) = tokenizer.encode("!", add_special_tokens=False)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}!\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=[0, 5, end_of_turn]).save_pretrained(folder)
    assert eos_ids(folder, FewShotPrompt()) == (0, 5, end_of_turn)
    assert eos_ids(folder, ChatPrompt()) == (end_of_turn, 0, 5)
