import json

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from restem_lightning.errors import UserError
from restem_lightning.problems import Problem
from restem_lightning.prompts import (
    ASSETS,
    ChatPrompt,
    FewShotPrompt,
    encode_answer,
    encode_prompt,
    template_hash,
)

PROBLEM = Problem(problem_id="p", question="How many {question} legs has a cat?")
OTHER = Problem(problem_id="q", question="What is 2+2?")
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(merges=(), adds_bos=False, chat_template=None):
    """Bytes as tokens, plus the merges given; <s> is put before a text if adds_bos."""
    vocabulary = {"<s>": 0, "</s>": 1}
    for symbol in [*pre_tokenizers.ByteLevel.alphabet(), *("".join(pair) for pair in merges)]:
        vocabulary[symbol] = len(vocabulary)
    tokenizer = Tokenizer(BPE(vocabulary, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = chat_template
    return fast


@pytest.fixture
def shots(tmp_path):
    path = tmp_path / "shots.jsonl"
    rows = [
        {"question": "1+1?", "answer": "2"},
        {"problem": "2+1?", "solution": "3"},
        {"question": "3+1?", "target": "4"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_few_shot_text_is_instruction_shots_and_question(shots):
    template = FewShotPrompt(shots=shots, num_shots=2, instruction="Solve.\n")
    prompt = template.render(PROBLEM, None)
    assert prompt.text == (
        "Solve.\nQ: 1+1?\nA: 2\n\nQ: 2+1?\nA: 3\n\nQ: How many {question} legs has a cat?\nA:"
    )
    assert prompt.preamble == "Solve.\nQ: 1+1?\nA: 2\n\nQ: 2+1?\nA: 3\n\n"


def test_a_hint_shows_the_reference_answer_of_the_problem_and_of_each_shot(tmp_path):
    path = tmp_path / "shots.jsonl"
    rows = [
        {"question": "1+1?", "answer": "It is 2.\n#### 2"},
        {"question": "2+1?", "answer": "three", "reference_answer": "3"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = FewShotPrompt(str(path), question_format="{question} ({reference_answer})\n")
    problem = Problem(problem_id="p", question="Is {reference_answer} 4?", reference_answer="4")
    assert template.render(problem, None).text == (
        "1+1? (2)\n It is 2.\n#### 2\n\n2+1? (3)\n three\n\nIs {reference_answer} 4? (4)\n"
    )
    tokenizer = make_tokenizer()
    other = FewShotPrompt(question_format="{question} {reference_answer}")
    plain = FewShotPrompt(question_format="{question} ")
    assert template_hash(other, tokenizer) != template_hash(plain, tokenizer)


def test_zero_shot_has_no_preamble():
    prompt = FewShotPrompt().render(OTHER, None)
    assert (prompt.text, prompt.preamble) == ("Q: What is 2+2?\nA:", "")


def test_formats_of_the_shots_can_be_changed(shots):
    template = FewShotPrompt(
        shots=shots, num_shots=1, question_format="[{question}]", answer_format="={answer};",
        separator="",
    )  # fmt: skip
    assert template.render(OTHER, None).text == "[1+1?]=2;[What is 2+2?]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"question_format": "Q:"}, "question_format"),
        ({"answer_format": "A"}, "answer_format"),
        ({"shots": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_a_bad_template_is_refused_at_once(arguments, message):
    with pytest.raises(UserError, match=message):
        FewShotPrompt(**arguments)


def test_more_shots_than_there_are_are_refused(shots):
    with pytest.raises(UserError, match=r"num_shots \(4\).* 3 "):
        FewShotPrompt(shots=shots, num_shots=4)


def test_shots_without_an_answer_are_refused_with_their_line(tmp_path):
    path = tmp_path / "shots.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n{"question": "a"}\n')
    with pytest.raises(UserError, match=r"shots\.jsonl:2"):
        FewShotPrompt(shots=str(path))


def test_chat_prompt_ends_where_the_policy_answers():
    tokenizer = make_tokenizer(chat_template=CHAT)
    prompt = ChatPrompt(system="Be brief.", question_format="{question} Think.").render(
        OTHER, tokenizer
    )
    assert prompt.text == "<system>Be brief.</s><user>What is 2+2? Think.</s><assistant>"
    assert prompt.preamble == "<system>Be brief.</s><user>"
    assert not prompt.add_special_tokens


def test_a_policy_without_chat_template_is_refused():
    with pytest.raises(UserError, match="chat template"):
        ChatPrompt().render(OTHER, make_tokenizer())


def test_chat_format_needs_the_question():
    with pytest.raises(UserError, match="question_format"):
        ChatPrompt(question_format="hello")


def test_ids_are_those_of_the_text_and_bos_comes_once(shots):
    tokenizer = make_tokenizer(adds_bos=True, chat_template="<s>" + CHAT)
    ids, _ = encode_prompt(FewShotPrompt(shots=shots), OTHER, tokenizer)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == FewShotPrompt(shots=shots).render(OTHER, tokenizer).text
    ids, _ = encode_prompt(ChatPrompt(), OTHER, tokenizer)
    assert ids.count(tokenizer.bos_token_id) == 1


def test_shared_ids_are_the_preamble_and_equal_in_all_problems(shots):
    tokenizer, template = make_tokenizer(adds_bos=True), FewShotPrompt(shots=shots)
    ids, shared = encode_prompt(template, PROBLEM, tokenizer)
    other_ids, other_shared = encode_prompt(template, OTHER, tokenizer)
    assert shared == other_shared == len(tokenizer.encode(template.preamble))
    assert ids[:shared] == other_ids[:shared]


def test_a_token_across_the_end_of_the_preamble_is_not_shared(shots):
    tokenizer = make_tokenizer(merges=[("Q", ":")])
    template = FewShotPrompt(shots=shots, question_format="{question}", separator="Q")
    colon = Problem(problem_id="c", question=": what?")
    ids, shared = encode_prompt(template, colon, tokenizer)
    preamble_ids = tokenizer.encode(template.preamble)
    assert shared == len(preamble_ids) - 1
    assert ids[:shared] == preamble_ids[:shared]
    assert tokenizer.decode(ids) == template.preamble + ": what?"


def test_at_least_one_id_is_left_to_a_prompt_that_is_all_preamble():
    class Constant(FewShotPrompt):
        def render(self, problem, tokenizer):
            prompt = super().render(problem, tokenizer)
            return type(prompt)(text="same", preamble="same", add_special_tokens=True)

    ids, shared = encode_prompt(Constant(), OTHER, make_tokenizer())
    assert (len(ids), shared) == (4, 3)


def test_an_empty_prompt_is_refused():
    template = FewShotPrompt(question_format="{question}")
    with pytest.raises(UserError, match="problem e "):
        encode_prompt(template, Problem(problem_id="e", question=""), make_tokenizer())


def test_the_hash_tells_templates_apart_and_stays_the_same(shots):
    tokenizer = make_tokenizer(chat_template=CHAT)
    templates = [
        FewShotPrompt(),
        FewShotPrompt(shots=shots),
        FewShotPrompt(separator="\n"),
        ChatPrompt(),
    ]
    hashes = [template_hash(template, tokenizer) for template in templates]
    assert hashes[0] == hashes[2]  # without shots no separator is ever written
    assert len({hashes[0], hashes[1], hashes[3]}) == 3
    assert template_hash(FewShotPrompt(shots=shots), tokenizer) == hashes[1]


def test_the_shots_for_programs_pass_their_own_tests():
    lines = (ASSETS / "prompts" / "code_3shot.jsonl").read_text().splitlines()
    for question, program in (json.loads(line).values() for line in lines):
        space = {}
        exec(program, space)
        exec(question.partition("It should pass:\n")[2], space)
        assert "assert " in question


def test_an_answer_is_encoded_as_a_policy_goes_on_behind_the_prompt():
    vocabulary = {c: i for i, c in enumerate(["<unk>", "\u2581", *"QA:Whatis2+.?four\n"])}
    core = Tokenizer(BPE(vocabulary, [], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    template = FewShotPrompt(question_format="Q: {question}\nA:\n", answer_format="{answer}")
    prompt_ids, ids = encode_answer(template, OTHER, tokenizer, "four")
    assert prompt_ids == encode_prompt(template, OTHER, tokenizer)[0]
    assert tokenizer.convert_ids_to_tokens(ids) == list("four")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("four")) == ["\u2581", *"four"]


def test_an_answer_that_merges_with_the_prompt_is_encoded_alone():
    tokenizer = make_tokenizer(merges=[("\u010a", "4")])  # a newline and 4
    template = FewShotPrompt(question_format="{question}\n", answer_format="{answer}")
    prompt_ids, ids = encode_answer(template, OTHER, tokenizer, "4.")
    assert prompt_ids == encode_prompt(template, OTHER, tokenizer)[0]
    assert tokenizer.decode(ids) == "4."
