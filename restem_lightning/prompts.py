"""Prompts: how a problem is put to the policy, as a few-shot preamble or by its chat template."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from restem_lightning.errors import UserError
from restem_lightning.problems import Problem
from restem_lightning.problems.records import read_rows

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt as text.

    Args:
        text: the whole prompt.
        preamble: its beginning that all problems share; may be empty.
        add_special_tokens: whether the tokenizer adds its own (not after a chat template).
    """

    text: str
    preamble: str
    add_special_tokens: bool


class PromptTemplate(Protocol):
    """Turns a problem into a prompt; named by class path in YAML."""

    def render(self, problem: Problem, tokenizer: Any) -> Prompt:
        """Returns the prompt of a problem.

        Args:
            problem: the problem.
            tokenizer: the policy's Hugging Face tokenizer.
        """


class FewShotPrompt:
    """Worked examples, then the question: for base models."""

    def __init__(
        self,
        shots: str | None = None,
        num_shots: int | None = None,
        question_format: str = "Q: {question}\nA:",
        answer_format: str = " {answer}",
        separator: str = "\n\n",
        instruction: str = "",
    ):
        r"""Describes the prompt.

        Args:
            shots: JSONL file (.gz allowed) with `question` and `answer` (or `target`, `solution`,
                `problem`) per line; a name without a folder is looked for in the package's prompts
                too. None for zero-shot.
            num_shots: how many of them, from the first; None for all.
            question_format: how a question is put; holds {question}, and as a hint may hold
                {reference_answer} (of a shot: its `reference_answer`, or what follows #### in it).
            answer_format: how an answer follows its question, in a shot and in a human solution to
                train on; holds {answer}.
            separator: between shots.
            instruction: text before everything.

        Raises:
            UserError: for a missing file or a format without its placeholder.
        """
        for name, value, field in (
            ("question_format", question_format, "{question}"),
            ("answer_format", answer_format, "{answer}"),
        ):
            if field not in value:
                raise UserError(f"{name} ({value!r}) must hold {field}")
        self.question_format, self.answer_format = question_format, answer_format
        pairs = _read_shots(shots)[:num_shots] if shots else []
        if num_shots is not None and len(pairs) < num_shots:
            raise UserError(f"num_shots ({num_shots}) is more than the {len(pairs)} of {shots}")
        self.preamble = instruction + "".join(
            self._question(question, reference) + self.render_answer(answer) + separator
            for question, answer, reference in pairs
        )

    def render(self, problem: Problem, tokenizer: Any) -> Prompt:
        """Returns the preamble and the question."""
        question = self._question(problem.question, problem.reference_answer or "")
        return Prompt(
            text=self.preamble + question, preamble=self.preamble, add_special_tokens=True
        )

    def render_answer(self, solution: str) -> str:
        """Returns a solution as it follows a question."""
        return self.answer_format.replace("{answer}", solution)

    def _question(self, question: str, reference_answer: str) -> str:
        parts = self.question_format.split("{question}")
        return question.join(p.replace("{reference_answer}", reference_answer) for p in parts)


class ChatPrompt:
    """The question as a user's message through the policy's own chat template."""

    def __init__(self, system: str | None = None, question_format: str = "{question}"):
        """Describes the conversation.

        Args:
            system: system message, None for the template's own.
            question_format: the user's message; holds {question}.

        Raises:
            UserError: for a format without its placeholder.
        """
        if "{question}" not in question_format:
            raise UserError(f"question_format ({question_format!r}) must hold {{question}}")
        self.system, self.question_format = system, question_format

    def render(self, problem: Problem, tokenizer: Any) -> Prompt:
        """Returns the conversation up to where the policy answers.

        Raises:
            UserError: if the policy has no chat template.
        """
        messages = [{"role": "system", "content": self.system}] if self.system else []
        question = self.question_format.replace("{question}", problem.question)
        messages.append({"role": "user", "content": question})
        text = _conversation(messages, tokenizer, add_generation_prompt=True)
        return Prompt(text=text, preamble=text.split(question)[0], add_special_tokens=False)

    def end_of_turn(self, tokenizer: Any) -> str:
        """Returns what the chat template writes behind an answer.

        Raises:
            UserError: if the policy has no chat template.
        """
        turns = {"user": "question", "assistant": "answer"}
        messages = [{"role": role, "content": content} for role, content in turns.items()]
        return _conversation(messages, tokenizer).rpartition("answer")[2]


def _conversation(messages: list[dict[str, str]], tokenizer: Any, **options: bool) -> str:
    """Returns messages as the policy's chat template writes them."""
    if not tokenizer.chat_template:
        raise UserError(
            "the policy's tokenizer has no chat template; use the FewShotPrompt for base models"
        )
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def encode_prompt(
    template: PromptTemplate, problem: Problem, tokenizer: Any
) -> tuple[list[int], int]:
    """Returns a problem's prompt ids and how many of the first ones its preamble accounts for.

    The second number depends on this problem alone, so it is the same in every batch and on resume.

    Raises:
        UserError: if the prompt is empty.
    """
    prompt = template.render(problem, tokenizer)
    encode = {"add_special_tokens": prompt.add_special_tokens}
    ids = tokenizer.encode(prompt.text, **encode)
    if not ids:
        raise UserError(f"problem {problem.problem_id} gives an empty prompt")
    shared = 0
    for ours, theirs in zip(ids[:-1], tokenizer.encode(prompt.preamble, **encode), strict=False):
        if ours != theirs:
            break
        shared += 1
    # A tokenizer may end the preamble with EOS or merge its last characters with the question's.
    return ids, shared


def encode_answer(
    template: PromptTemplate, problem: Problem, tokenizer: Any, answer: str
) -> tuple[list[int], list[int]]:
    """Returns a problem's prompt ids and those of a text behind it, as a policy would go on.

    A tokenizer that takes each text for the beginning of a sentence would put a space before the
    answer if it were encoded alone. That it still is where the two merge at their border.
    """
    prompt_ids, _ = encode_prompt(template, problem, tokenizer)
    prompt = template.render(problem, tokenizer)
    encode = {"add_special_tokens": prompt.add_special_tokens}
    ids = tokenizer.encode(prompt.text + answer, **encode)
    if ids[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, ids[len(prompt_ids) :]
    return prompt_ids, tokenizer.encode(answer, add_special_tokens=False)


def template_hash(template: PromptTemplate, tokenizer: Any) -> str:
    """Returns a hash of what the template makes of a made-up problem; part of a pool's key."""
    probe = Problem(
        problem_id="probe", question="How many letters are in the word four?", reference_answer="4"
    )
    prompt = template.render(probe, tokenizer)
    return hashlib.sha256(json.dumps([prompt.text, prompt.add_special_tokens]).encode()).hexdigest()


def _read_shots(path: str) -> list[tuple[str, str, str]]:
    """Returns (question, answer, reference answer) of each shot."""
    file = Path(path)
    if not file.exists() and (ASSETS / "prompts" / path).exists():
        file = ASSETS / "prompts" / path
    if not file.is_file():
        raise UserError(f"shots ({path}) must be a JSONL file; there is none")
    pairs = []
    for number, row in read_rows(file):
        question = row.get("question", row.get("problem"))
        answer = row.get("answer", row.get("target", row.get("solution")))
        if not isinstance(question, str) or not isinstance(answer, str):
            raise UserError(f"{file}:{number} must hold `question` and `answer` as text")
        reference = row.get("reference_answer", answer.rpartition("####")[2].strip())
        pairs.append((question, answer, str(reference)))
    return pairs
