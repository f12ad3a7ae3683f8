"""The program in a completion. Nothing here runs it.

Only text after `</think>` counts, and only what stands between lines that begin with [BEGIN] and
[DONE], where there are such lines. Of that, the first of these is the program:

1. A body that goes on with the function whose head was the prompt (HumanEval): indented text.
2. The last fenced block of Python that defines the entry point (for a standard-input program: that
   reads or prints), behind those other blocks that define names which it lacks.
3. Outside fences, the first lines that are Python and define the entry point, up to the first
   statement that is not Python.
4. A fenced block with a body for the prompt's function.
5. The last fenced block, a text that is Python as a whole, or what begins like a definition: a
   program, but one that will fail.

Nothing is mended, but a function that stands without the imports and helpers of its prompt gets
them, and a class Solution or a function called by `fn_name` the imports that such sites lend. Of a
function's program, what follows the function is kept only as far as the function needs it: a
policy's own examples, checks and invented next problems do not run.
"""

import ast
import builtins
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence

from restem_lightning.problems import Problem

MAX_TEXT = 20_000
MAX_PARSED = 100_000  # characters in all that are parsed to find where code begins and ends

_MARKS = {name: re.compile(rf"^[ \t]*\[{name}\]", re.MULTILINE) for name in ("BEGIN", "DONE")}
_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})[ \t]*([\w+.#-]*)[^`]*")
_LANGUAGE = re.compile(r"(py(thon)?[\d.]*)?", re.IGNORECASE)
_NEXT_PROBLEM = re.compile(r"(Q|Question|Problem):")
_CODE = re.compile(
    r"(async def|def|class) \w|import \w|from [\w.]+ import |@\w|print\("
    r"|(for|while|if|with|try)\b.*:|\w[\w., \[\]*]* ?([-+*/]|//)?=(?!=)"
)
_INPUT_OUTPUT = ("input", "print", "open", "stdin", "stdout")
# What a site that calls a function lends it; APPS evaluates its own solutions with such a list.
_LENT = """\
import bisect, collections, functools, heapq, itertools, math, random, re, string
from bisect import bisect_left, bisect_right
from collections import ChainMap, Counter, OrderedDict, defaultdict, deque
from functools import cache, cmp_to_key, lru_cache, reduce
from heapq import heapify, heappop, heappush
from itertools import accumulate, combinations, permutations, product
from math import ceil, floor, gcd, inf, log, sqrt
from typing import Any, Dict, List, Optional, Set, Tuple, Union
"""


def extract_program(completion_text: str, problem: Problem) -> str | None:
    """Returns the program in a completion by the rules above, None if there is none.

    Safe for any text; of what may count, the first 20,000 characters do.

    Args:
        completion_text: what the policy wrote after the prompt.
        problem: its `entry_point`, or `fn_name` among `metadata["input_output"]`, is the function
            under test, None for a standard-input program;
            `metadata["prompt"]` is the head of the function, where there is one (see `head_of`).
    """
    text = _marked(completion_text)
    if text is None:
        return None
    text = text[:MAX_TEXT].replace("\r\n", "\n").replace("\r", "\n")
    called = (problem.metadata.get("input_output") or {}).get("fn_name")
    name, head = problem.entry_point or called, head_of(problem)
    is_body = name and head and _is_indented(text)
    if is_body and (program := _continued(head, text, name)):
        return program
    fenced = list(_fenced_blocks(text))
    blocks = [_dedented(block) for block in fenced]
    runs = list(_python_runs(text, name))
    if program := _best_block(blocks, name) or _first(runs, name):
        return _with_lent(_without_tail(_with_head(program, head, name), name), called)
    bodies = [block for block in fenced if head and name and _is_indented(block)]
    if bodies:
        return _continued(head, bodies[-1], name) or head + bodies[-1]
    if is_body and not blocks:
        return head + text
    return _last_resort(text, blocks, runs)


def head_of(problem: Problem) -> str | None:
    """Returns the head of the function that the completion may go on with, None without one.

    It is `metadata["prompt"]`, or else a question that is Python and defines the entry point.
    """
    if prompt := problem.metadata.get("prompt"):
        return prompt
    name, question = problem.entry_point, problem.question
    return question if f"def {name}(" in question and _answers(_parse(question), name) else None


def _marked(text: str) -> str | None:
    """Returns what counts of a text, None if it ends within its thoughts."""
    _, closed, text = text.rpartition("</think>")
    if not closed and "<think>" in text:
        return None
    if done := _MARKS["DONE"].search(text):
        text = text[: done.start()]
    begin = _MARKS["BEGIN"].search(text)
    return text[begin.end() :] if begin else text


def _fenced_blocks(text: str) -> Iterator[str]:
    """Yields the Python blocks between fences, the last one also if its fence is never closed.

    A line outside them that begins the next problem ends the text, once there was a block.
    """
    fence, indent, language, block, had_block = "", 0, "", [], False
    for line in text.split("\n"):
        if fence:
            depth = len(line) - len(line.lstrip())
            if line.strip().startswith(fence) and depth < indent + 4:
                if _LANGUAGE.fullmatch(language) and any(map(str.strip, block)):
                    yield "\n".join(block) + "\n"
                fence, had_block = "", True
            else:
                block.append(line[min(depth, indent) :])
        elif match := _FENCE.fullmatch(line):
            fence, indent, block = match[2], len(match[1]), []
            language = match[3]
        elif had_block and _NEXT_PROBLEM.match(line):
            return
    if fence and _LANGUAGE.fullmatch(language) and (rest := "\n".join(block)).strip():
        run = next(_python_runs(rest, None), None)
        yield run if run and rest.startswith(run.rstrip("\n")) else rest


def _best_block(blocks: Sequence[str], name: str | None) -> str | None:
    """Returns the last block that is the program, behind the blocks that it needs."""
    at = max((i for i, block in enumerate(blocks) if _answers(_parse(block), name)), default=None)
    if at is None:
        return None
    parts, others = [blocks[at]], [block for i, block in enumerate(blocks) if i != at]
    while others:
        tree = _parse("\n".join(parts))
        lacking = _lacking(tree.body) if tree else set()
        found = [other for other in others if lacking & _bound_by((_parse(other) or _EMPTY).body)]
        if not found:
            break
        parts.insert(0, found[-1])
        others.remove(found[-1])
    return "\n".join(parts)


def _python_runs(text: str, name: str | None) -> Iterator[str]:
    """Yields the runs of lines that are Python and begin like code, in order."""
    lines = text.split("\n")
    wanted = re.compile(rf"[ \t]+(async )?def {re.escape(name)}\b") if name else None
    start, left = 0, MAX_PARSED
    while start < len(lines) and left > 0:
        line = lines[start]
        if wanted and wanted.match(line):  # an indented code block of Markdown
            indent = line[: len(line) - len(line.lstrip())]
            block = [line[len(indent) :] for line in _while_indented(lines[start:], indent)]
        elif _CODE.match(line):
            block = lines[start:]
        else:
            start += 1
            continue
        end, parsed = _python_prefix(block, left)
        if end:
            yield "\n".join(block[:end]).rstrip() + "\n"
        start, left = start + max(end, 1), left - parsed


def _python_prefix(lines: Sequence[str], max_parsed: int) -> tuple[int, int]:
    """Returns how many lines from the first are whole statements, and the characters parsed."""
    end, parsed = len(lines), 0
    while end > 0 and parsed < max_parsed:
        text = "\n".join(lines[:end])
        parsed += len(text)
        error_line = _syntax_error_line(text)
        if error_line is None:
            return end, parsed
        end = min(error_line, end) - 1
        while end > 0 and lines[end][:1] in ("", " ", "\t"):
            end -= 1  # a statement that breaks off goes as a whole
    return 0, parsed


def _while_indented(lines: Iterable[str], indent: str) -> Iterator[str]:
    for line in lines:
        if line.strip() and not line.startswith(indent):
            return
        yield line


def _continued(head: str, body: str, name: str) -> str | None:
    """Returns the function of a head and its body, None if together they are not Python."""
    lines = (head.replace("\r\n", "\n") + body).split("\n")
    end, _ = _python_prefix(lines, MAX_PARSED)
    program = "\n".join(lines[:end]) + "\n"
    if not _answers(_parse(program), name):
        return None
    return _without_tail(program, name, first=True)


def _with_head(program: str, head: str | None, name: str | None) -> str:
    """Returns a program behind what the prompt has before its function, if it lacks that."""
    tree, head_tree = _parse(program), _parse(head or "")
    if name is None or tree is None or head_tree is None:
        return program
    at = next((i for i, node in enumerate(head_tree.body) if name in _bound_by([node])), 0)
    if not _lacking(tree.body) & _bound_by(head_tree.body[:at]):
        return program
    end = head_tree.body[at - 1].end_lineno
    return _behind_future(tree, program, [*head.split("\n")[:end], ""])


def _with_lent(program: str, called: str | None) -> str:
    """Returns a program behind the lent imports that it lacks, if it is one that gets them."""
    tree = _parse(program) if called or "class Solution" in program else None
    if tree is None:
        return program
    lacking = _lacking(tree.body)
    lent = [ast.unparse(node) for node in ast.parse(_LENT).body if lacking & _bound_by([node])]
    return _behind_future(tree, program, lent)


def _behind_future(tree: ast.Module, program: str, lines: Sequence[str]) -> str:
    """Returns a program with lines before its first one, or behind its imports of __future__."""
    future = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    at = max((node.end_lineno for node in future if node.module == "__future__"), default=0)
    own = program.split("\n")
    return "\n".join([*own[:at], *lines, *own[at:]])


def _without_tail(program: str, name: str | None, *, first: bool = False) -> str:
    """Returns a function's program up to the last statement that the function needs.

    Args:
        program: the source.
        name: the entry point, None for a standard-input program, which is left whole.
        first: whether the first definition of the entry point counts instead of the last.
    """
    tree = _parse(program)
    if name is None or tree is None:
        return program
    defining = [i for i, node in enumerate(tree.body) if name in _bound_by([node])]
    defining = defining or [i for i, node in enumerate(tree.body) if name in _methods([node])]
    if not defining:
        return program
    keep = defining[0 if first else -1]
    while True:
        lacking = _lacking(tree.body[: keep + 1])
        needed = [i for i in range(keep + 1, len(tree.body)) if lacking & _bound_by([tree.body[i]])]
        if not needed:
            break
        keep = needed[-1]
    return "\n".join(program.split("\n")[: tree.body[keep].end_lineno]) + "\n"


def _last_resort(text: str, blocks: Sequence[str], runs: Sequence[str]) -> str | None:
    """Returns what is meant as a program, though it is not one that can be right."""
    if blocks:
        return blocks[-1]
    if runs and runs[0].strip() == text.strip():
        return runs[0]
    begin = re.search(r"^[ \t]*(async def|def|class) \w", text, re.MULTILINE)
    return text[begin.start() :].rstrip() + "\n" if begin else None


def _first(runs: Iterable[str], name: str | None) -> str | None:
    return next((run for run in runs if _answers(_parse(run), name)), None)


def _is_indented(text: str) -> bool:
    """Returns whether the first line that is not empty is indented."""
    return text.lstrip("\n")[:1] in (" ", "\t") and bool(text.strip())


def _dedented(block: str) -> str:
    """Returns a block that is indented as a whole without that, if only then it is Python."""
    dedented = textwrap.dedent(block)
    return dedented if _parse(block) is None and _parse(dedented) else block


_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_NAMED = (*_DEFINITIONS, ast.ExceptHandler)
_EMPTY = ast.Module(body=[], type_ignores=[])


def _parse(text: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the policy's odd escapes
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _syntax_error_line(text: str) -> int | None:
    """Returns the line, from 1, of the first thing that is not Python, None if all is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except SyntaxError as error:
        return max(error.lineno or 1, 1)
    except (ValueError, RecursionError, MemoryError):
        return 1
    return None


def _answers(tree: ast.Module | None, name: str | None) -> bool:
    """Returns whether a module defines the entry point, or reads or prints if there is none."""
    if tree is None:
        return False
    if name is not None:
        return name in _bound_by(tree.body) | _methods(tree.body)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return not names.isdisjoint(_INPUT_OUTPUT)


def _methods(statements: Iterable[ast.stmt]) -> set[str]:
    """Returns the names that the classes among statements define within themselves."""
    classes = [node for node in statements if isinstance(node, ast.ClassDef)]
    return {name for node in classes for name in _bound_by(node.body)}


def _bound_by(statements: Iterable[ast.stmt]) -> set[str]:
    """Returns the names that statements define or change in their own scope."""
    bound: set[str] = set()
    pending: list[ast.AST] = list(statements)
    while pending:
        node = pending.pop()
        if isinstance(node, _DEFINITIONS):
            bound.add(node.name)
            continue
        if isinstance(node, ast.alias):
            bound.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.Name | ast.Attribute | ast.Subscript):
            if isinstance(node.ctx, ast.Store):
                while isinstance(node, ast.Attribute | ast.Subscript):
                    node = node.value
                bound |= {node.id} if isinstance(node, ast.Name) else set()
        elif isinstance(node, ast.Lambda | ast.comprehension):
            continue
        pending.extend(ast.iter_child_nodes(node))
    return bound


def _lacking(statements: Iterable[ast.stmt]) -> set[str]:
    """Returns the names that statements read and never bind, in any scope; no builtins."""
    read, bound = set(), set(dir(builtins))
    for statement in statements:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name):
                (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
            elif isinstance(node, ast.arg):
                bound.add(node.arg)
            elif isinstance(node, ast.alias):
                bound.add((node.asname or node.name).split(".")[0])
            elif isinstance(node, _NAMED) and node.name:
                bound.add(node.name)
    return read - bound
