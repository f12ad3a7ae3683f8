"""What to say about an option, a word or a class that no parser of ours knows."""

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager

from jsonargparse import ArgumentError, ArgumentParser

from restem_lightning import problems, prompts
from restem_lightning.errors import UserError

# How jsonargparse says that an option is unknown: a word of the command line, or a key of a YAML.
UNKNOWN = re.compile(
    r"unrecognized arguments: --([^\s=]+)|(?:Group '(.+)' does not accept option|Option) '(.+?)'"
)
UNKNOWN_WORD = re.compile(r"unrecognized arguments: (\S+)")
UNKNOWN_ARGUMENT = re.compile(r'key "(\S+)":\s+Problem with given class_path \'(\S+)\':\s+Option')
UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (\w+)")


@contextmanager
def likely_meant(parser: ArgumentParser) -> Iterator[None]:
    """Adds the likely name, or where to find it, to the error of what is unknown.

    Raises:
        UserError: an option, a word or a class is unknown.
    """
    try:
        yield
    except ArgumentError as error:
        if remedy := _remedy(str(error), parser):
            raise UserError(f"{error}; {remedy}") from error
        raise


def _remedy(message: str, parser: ArgumentParser) -> str | None:
    if "arguments are required" in message:
        return "give it, or a --config that has it"
    if name := UNKNOWN_CLASS.search(message):
        homes = [home.__name__ for home in (prompts, problems) if hasattr(home, name[1])]
        return f"did you mean {homes[0]}.{name[1]}?" if homes else "give module and class"
    options = [option.removeprefix("--") for option in parser._option_string_actions]
    if (argument := UNKNOWN_ARGUMENT.search(message)) and f"{argument[1]}.help" in options:
        return f"`{parser.prog} --{argument[1]}.help {argument[2]}` lists what it takes"
    if unknown := UNKNOWN.search(message):
        name = ".".join(part for part in unknown.groups() if part)
        begun = sorted((option for option in options if option.startswith(name)), key=len)
        last = name.rpartition(".")[2]
        ends = [option for option in options if option == last or option.endswith(f".{name}")]
        close = begun or ends or difflib.get_close_matches(name, options, n=1)
        return f"did you mean {close[0]}?" if close else f"`{parser.prog} --help` lists all"
    if word := UNKNOWN_WORD.search(message):
        if word[1].endswith((".yaml", ".yml")):
            return f"did you mean --config {word[1]}?"
        return f"a value follows its option; `{parser.prog} --help` lists these"
    return None
