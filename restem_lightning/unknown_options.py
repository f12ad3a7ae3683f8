"""What to say about an option that no parser of ours knows."""

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager

from jsonargparse import ArgumentError, ArgumentParser

from restem_lightning.errors import UserError

# How jsonargparse says that an option is unknown: a word of the command line, or a key of a YAML.
UNKNOWN = re.compile(
    r"unrecognized arguments: --([^\s=]+)|(?:Group '(.+)' does not accept option|Option) '(.+?)'"
)


@contextmanager
def likely_meant(parser: ArgumentParser) -> Iterator[None]:
    """Adds the likely name to the error of an unknown option.

    Raises:
        UserError: an option is unknown.
    """
    try:
        yield
    except ArgumentError as error:
        if (unknown := UNKNOWN.search(str(error))) is None:
            raise
        name = ".".join(part for part in unknown.groups() if part)
        options = [option.removeprefix("--") for option in parser._option_string_actions]
        close = difflib.get_close_matches(name, options, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"`{parser.prog} --help` lists all"
        raise UserError(f"{error}; {remedy}") from error
