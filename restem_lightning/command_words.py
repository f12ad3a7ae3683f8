"""Mistakes in the words of a command that jsonargparse lets pass, or reports without a place."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from restem_lightning.errors import UserError


def check_words(words: Sequence[str]) -> None:
    """Does nothing if the words after a verb, and the config files they name, can be parsed.

    Raises:
        UserError: a config file is not YAML or has a key twice, or a part of `verifier` is given.
    """
    for word, following in zip(words, [*words[1:], ""], strict=False):
        option, _, value = word.partition("=")
        if option.startswith("--verifier."):  # jsonargparse takes its value for the whole verifier
            raise UserError(
                f"{option}: verifier is given as a whole, such as "
                """--verifier '{"class_path": "math", "init_args": {"answer_format": "gsm8k"}}'"""
            )
        if option in ("-c", "--config"):
            path = Path(value or following)
            if path.is_file() and path.suffix != ".json":
                _check_config(path)


def _check_config(path: Path) -> None:
    """Checks a YAML file of settings.

    Raises:
        UserError: it is none, or one of its keys is there twice, of which YAML takes the last.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise UserError(f"config {path} must be a text file in UTF-8; save it as one") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1
        raise UserError(
            f"config {path} line {line} is not YAML: {error.problem}; mend it (brackets and quotes "
            "are closed, and lines indented by spaces)"
        ) from error
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"config {path} must hold settings, such as `iterations: 3`; add some")
    if twice := next(_repeated(root), None):
        line, key = twice
        raise UserError(
            f"config {path} line {line}: {key} is there twice, and only the last one would count; "
            "make one of both"
        )


def _repeated(node: yaml.Node) -> Iterator[tuple[int, str]]:
    """Yields line and name of each key that a mapping, or one inside it, has once more."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                yield key.start_mark.line + 1, name
            seen.add(name)
    if not isinstance(node, yaml.ScalarNode):
        for one in node.value:
            for inner in one if isinstance(one, tuple) else (one,):
                yield from _repeated(inner)
