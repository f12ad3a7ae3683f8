import time

import pytest

from restem_lightning.problems import Problem
from restem_lightning.verifiers.programs import extract_program

F = "def f(x):\n    return x + 1\n"
G = "def g(x):\n    return x + 1\n"
F_OF_UP = "def f(x):\n    return up(x)\n"
F_OF_G = "def f(x):\n    return g(x)\n"
DOCUMENTED = 'def f(x):\n    """Adds.\n\n    ```\n    f(1)\n    ```\n    """\n    return x + 1\n'
METHOD = "class Solution:\n    def f(self, x):\n        return x + 1\n"
MAIN = 'def main():\n    print(int(input()) + 1)\n\nif __name__ == "__main__":\n    main()\n'
USE = "print(f(1))\n"
TYPED_METHOD = "class Solution:\n    def f(self, x: List[int]):\n        return sum(x)\n"
WRONG_F = "def f(x):\n    return x\n"
HEAD = 'import math\n\ndef up(x):\n    return x + 1\n\ndef f(x: int) -> int:\n    """Adds one."""\n'
BODY = "    y = x\n    return y + 1\n"
FUNCTION = Problem(problem_id="f", question="-", tests="assert f(1) == 2", entry_point="f")
HEADED = Problem(
    problem_id="h", question=HEAD, tests="assert f(1) == 2", entry_point="f",
    metadata={"prompt": HEAD},
)  # fmt: skip
SCRIPT = Problem(
    problem_id="s", question="-", metadata={"input_output": {"inputs": ["1"], "outputs": ["2"]}}
)
S = "n = int(input())\nprint(n + 1)\n"


def fenced(text, language="python", fence="```"):
    return f"{fence}{language}\n{text}{fence}\n"


# What comes out is the program exactly.
FUNCTIONS = {
    "bare function": (F, F),
    "bare function without an end of line": (F.rstrip(), F),
    "empty lines around it": (f"\n\n{F}\n\n", F),
    "fenced as python": (fenced(F), F),
    "fenced as py": (fenced(F, "py"), F),
    "fenced as Python": (fenced(F, "Python"), F),
    "fenced as a version of Python": (fenced(F, "python3.11"), F),
    "fenced without a language": (fenced(F, ""), F),
    "fenced by tildes": (fenced(F, fence="~~~"), F),
    "fenced by four": (fenced(F, fence="````"), F),
    "prose around the fence": (f"Sure, here it is:\n\n{fenced(F)}\nIt adds one.", F),
    "prose around a bare function": (f"Here is the function:\n\n{F}\nThis adds one to x.", F),
    "prose right behind a bare function": (f"{F}This adds one.", F),
    "a word of prose that is Python": (f"{F}\nDone", F),
    "imports before it": (f"import math\nfrom os import path\n\n{F}",) * 2,
    "a constant before it": (f"R = 3\n{F}",) * 2,
    "a decorator": (f"from functools import cache\n\n@cache\n{F}",) * 2,
    "a helper before it": (f"def g():\n    pass\n\n{F}",) * 2,
    "a class before it": (f"class A:\n    pass\n\n{F}",) * 2,
    "a lambda": ("f = lambda x: x + 1\n",) * 2,
    "a helper that it needs behind it": (
        f"{F_OF_G}\nprint(1)\n\n{G}\ndef h():\n    pass\n",
        f"{F_OF_G}\nprint(1)\n\n{G}",
    ),
    "a constant that it needs behind it": (
        "def f(x):\n    return x + ONE\n\nONE = 1\nf(2)\n",
        "def f(x):\n    return x + ONE\n\nONE = 1\n",
    ),
    "a wrapper behind it": (f"{F}\nf = print and f\nf(0)\n", f"{F}\nf = print and f\n"),
    "an attribute of it": (f"{F}\nf.cache = {{}}\nf(0)\n", f"{F}\nf.cache = {{}}\n"),
    "its own checks behind it": (f"{F}\nassert f(1) == 3\nprint(f(2))\n", F),
    "a main block": (f'{F}\nif __name__ == "__main__":\n    print(f(int(input())))\n', F),
    "a main block in a fence": (fenced(f'{F}\nif __name__ == "__main__":\n    main()\n'), F),
    "an invented next function": (f"{F}\n\ndef other(x: Unknown):\n    return 2\n", F),
    "an invented next function that breaks off": (f"{F}\n\ndef other(x):\n    return (", F),
    "an invented next class": (f"{F}\n\nclass Other(Unknown):\n    pass\n", F),
    "an invented next problem": (f"{F}\n\nQ: Write f(x): return x.\nA:\n{WRONG_F}", F),
    "an invented next problem in fences": (
        f"{fenced(F)}\nQuestion: f(x) is x.\n{fenced(WRONG_F)}",
        F,
    ),
    "the last of two versions": (f"{fenced(WRONG_F)}\nThat is wrong:\n\n{fenced(F)}", F),
    "an example of use behind it": (f"{fenced(F)}\nUse:\n\n{fenced(USE)}", F),
    "an example of use before it": (f"{fenced(USE)}\n{fenced(F)}", F),
    "a shell block behind it": (f"{fenced(F)}\nRun:\n" + fenced("python f.py\n", "bash"), F),
    "its output behind it": (f"{fenced(F)}\nOutput:\n" + fenced("2\n", ""), F),
    "bare function, fenced example": (f"{F}\nExample:\n{fenced(USE)}", F),
    "helper in a block before": (
        fenced(G) + "then\n" + fenced(F_OF_G),
        G + "\n" + F_OF_G,
    ),
    "helper in a block behind": (
        fenced(F_OF_G) + "with\n" + fenced(G),
        G + "\n" + F_OF_G,
    ),
    "import in a block of its own": (
        fenced("import math\n") + "and\n" + fenced("def f(x):\n    return math.ceil(x) + 1\n"),
        "import math\n\ndef f(x):\n    return math.ceil(x) + 1\n",
    ),
    "a fence that is never closed": (f"Here:\n```python\n{F}", F),
    "a fence that is never closed, prose": (f"```python\n{F}\nThis adds one.", F),
    "an indented fence": ("1. So:\n   ```python\n   def f(x):\n       return x + 1\n   ```\n", F),
    "an indented block": ("Here:\n\n    def f(x):\n        return x + 1\n\nIt adds one.", F),
    "a block that is indented as a whole": (fenced("  def f(x):\n      return x + 1\n"), F),
    "a fence within a docstring": (fenced(DOCUMENTED), DOCUMENTED),
    "tabs": ("def f(x):\n\treturn x + 1\n", "def f(x):\n\treturn x + 1\n"),
    "carriage returns": (F.replace("\n", "\r\n"), F),
    "carriage returns in a fence": (fenced(F).replace("\n", "\r\n"), F),
    "BEGIN and DONE": (f"[BEGIN]\n{F}[DONE]\n", F),
    "DONE alone": (f"{F}[DONE]\n\n[PROBLEM]\nx\n[BEGIN]\n{WRONG_F}[DONE]", F),
    "a fence within BEGIN and DONE": (f"[BEGIN]\n{fenced(F)}[DONE]", F),
    "thoughts": (f"<think>maybe\n{fenced(WRONG_F)}</think>\n{fenced(F)}", F),
    "reasoning with code before it": (f"x = 1 gives 2.\nSo x = 2\ngives 3.\n\n{F}", F),
    "a method": (fenced(METHOD), METHOD),
    "an example of use behind a method": (f"{METHOD}\nprint(Solution().f(int(input())))\n", METHOD),
    "a method without its imports": (
        TYPED_METHOD,
        f"from typing import Any, Dict, List, Optional, Set, Tuple, Union\n{TYPED_METHOD}",
    ),
    "a function without its imports is not mended": ("def f(x):\n    return gcd(x, 2)\n",) * 2,
    "statements without a function: a program, if a wrong one": ("while True:\n    pass\n",) * 2,
    "another name: a program, if a wrong one": (fenced(G), G),
    "a broken function is not mended": ("def f(x):\n    return )\n    x\n",) * 2,
    "a broken block is not mended": (fenced("def f(x):\n  return (\n"), "def f(x):\n  return (\n"),
    "a function that breaks off": ("def f(x):\n    return (x +", "def f(x):\n    return (x +\n"),
    "the good lines of a broken function": ("def f(x):\n    y = x + 1\n    return y y\n",) * 2,
}  # fmt: skip

HEADED_CASES = {
    "a body": (BODY, HEAD + BODY),
    "a body behind an empty line": ("\n" + BODY, f"{HEAD}\n{BODY}"),
    "a body, then prose": (f"{BODY}\nThis adds one.", HEAD + BODY),
    "a body, then the end of a fence": (f"{BODY}```\n\nIt adds one.", HEAD + BODY),
    "a body, then a check": (f"{BODY}\nprint(f(1))\nassert f(1) == 3\n", HEAD + BODY),
    "a body, then the function anew": (f"{BODY}\n\n{WRONG_F}", HEAD + BODY),
    "a body, then a helper that it needs": (
        f"    return g(x)\n\n{G}",
        f"{HEAD}    return g(x)\n\n{G}",
    ),
    "a body, then an invented function": (f"{BODY}\ndef g(x: Unknown):\n    pass\n", HEAD + BODY),
    "a body with a wrong dedent stays wrong": (BODY[1:], HEAD + BODY[1:]),
    "a body in a fence": (fenced(BODY), HEAD + BODY),
    "a body in a fence, prose before": (f"The body is:\n{fenced(BODY)}", HEAD + BODY),
    "the whole function": (F, F),
    "the whole function in a fence": (fenced(F), F),
    "prose that begins with a space, a fence": (f" Here it is:\n{fenced(F)}", F),
    "the prompt again": (HEAD + BODY, HEAD + BODY),
    "a function that needs the prompt's import": (
        fenced("def f(x):\n    return math.floor(x) + 1\n"),
        "import math\n\ndef up(x):\n    return x + 1\n\ndef f(x):\n    return math.floor(x) + 1\n",
    ),
    "a function that needs the prompt's helper": (
        "def f(x):\n    return up(x)\n",
        "import math\n\ndef up(x):\n    return x + 1\n\ndef f(x):\n    return up(x)\n",
    ),
    "an import of __future__ stays first": (
        f"from __future__ import annotations\n{F_OF_UP}",
        "from __future__ import annotations\nimport math\n\ndef up(x):\n    return x + 1\n\n"
        f"{F_OF_UP}",
    ),
}  # fmt: skip

SCRIPTS = {
    "bare": (S, S),
    "fenced": (f"Read n.\n{fenced(S)}Done.", S),
    "bare, prose around it": (f"Read n and print:\n\n{S}\nThat is all.", S),
    "with a main block": (fenced(MAIN), MAIN),
    "with sys": ("import sys\nfor line in sys.stdin:\n    print(int(line) + 1)\n",) * 2,
    "an example of input behind it": (f"{fenced(S)}\nInput:\n" + fenced("1\n", ""), S),
    "the last of two": (fenced("print(1)\n") + "Better:\n" + fenced(S), S),
}

NONE = {
    "nothing": "",
    "white space": " \n\t\n",
    "prose": "I cannot solve this problem.",
    "prose that is Python": "Explanation\n\nNote: 5\n",
    "an answer": "The answer is 42.",
    "a shell block": fenced("rm -rf x\n", "bash"),
    "thoughts that never end": f"<think>{fenced(F)}",
    "an empty fence": "```python\n```\n",
    "an empty fence that is never closed": "```python\n",
    "DONE at once": f"[DONE]\n{F}",
}


@pytest.mark.parametrize(("text", "program"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_the_program_of_a_function_problem(text, program):
    assert extract_program(text, FUNCTION) == program


@pytest.mark.parametrize(("text", "program"), HEADED_CASES.values(), ids=HEADED_CASES)
def test_the_program_of_a_problem_with_a_function_to_complete(text, program):
    assert extract_program(text, HEADED) == program


@pytest.mark.parametrize(("text", "program"), HEADED_CASES.values(), ids=HEADED_CASES)
def test_a_question_that_is_the_function_to_complete_is_its_head(text, program):
    problem = Problem(problem_id="h", question=HEAD, tests="assert f(1) == 2", entry_point="f")
    assert extract_program(text, problem) == program


def test_a_called_function_gets_the_imports_that_its_site_lends():
    cases = {"inputs": [[4]], "outputs": [[2]], "fn_name": "f"}
    problem = Problem(problem_id="c", question="-", metadata={"input_output": cases})
    program = "def f(x):\n    return gcd(x, 2)\n"
    lent = "from math import ceil, floor, gcd, inf, log, sqrt\n"
    assert extract_program(fenced(program), problem) == lent + program


@pytest.mark.parametrize(("text", "program"), SCRIPTS.values(), ids=SCRIPTS)
def test_the_program_of_a_standard_input_problem(text, program):
    assert extract_program(text, SCRIPT) == program


@pytest.mark.parametrize("text", NONE.values(), ids=NONE)
@pytest.mark.parametrize("problem", [FUNCTION, HEADED, SCRIPT], ids=["f", "headed", "script"])
def test_a_text_without_a_program_has_none(text, problem):
    assert extract_program(text, problem) is None


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return " + "-" * 60_000 + "x\n",
        "def f(x):\n    return " + "(" * 60_000,
        "x = 1\nand so on\n" * 3_000,
        "def f(x):\n    return (\n" * 2_000,
        "```\n" * 12_000,
        "@a\n" * 16_000,
        "if x: y\n" * 6_000 + F,
        "def f(x):\n" + "\n".join(" " * depth + "if x:" for depth in range(1, 200)),
        "\0" * 50_000,
        "\ud800\u202e def f(x):\n    return '\ud800'\n",
        " " * 50_000,
    ],
    ids=range(11),
)
def test_odd_texts_take_little_time(text):
    start = time.process_time()
    for problem in (FUNCTION, HEADED, SCRIPT):
        extract_program(text, problem)
    assert time.process_time() - start < 5.0


def test_what_comes_out_goes_in_again():
    for text, _ in FUNCTIONS.values():
        program = extract_program(text, FUNCTION)
        assert extract_program(f"```python\n{program}```", FUNCTION) == program
