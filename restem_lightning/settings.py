"""What several verbs let a user set, and how the values become objects."""

import json
import logging
from argparse import ArgumentTypeError
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from transformers.utils import logging as transformers_logging

from restem_lightning.errors import UserError
from restem_lightning.m_step.export import check_policy_folder
from restem_lightning.prompts import ASSETS, PromptTemplate
from restem_lightning.sampler import EngineParams, SamplingParams
from restem_lightning.verifiers import VERIFIERS, VerifierPool, verifier_spec

EMBEDDED_POLICY = ASSETS / "policy"
EMBEDDED_POLICIES = {"embedded": EMBEDDED_POLICY, "embedded_code": ASSETS / "code_policy"}
VERIFIER_HELP = (
    f"Name ({', '.join(VERIFIERS)}), class path (package.module.Class or path/file.py:Class), or "
    "{class_path, init_args}."
)


class _VerifierSetting:
    """The type of the setting `verifier`: as YAML gives it; on the command line a mapping is JSON.

    jsonargparse's own type for mappings takes every `class_path` for a class it can import itself.
    """

    def __call__(self, value: str | dict[str, Any]) -> str | dict[str, Any]:
        is_json = isinstance(value, str) and value.startswith("{")
        try:
            return json.loads(value) if is_json else value
        except ValueError as error:
            raise ArgumentTypeError(f"{value} is not JSON ({error})") from error

    def __repr__(self) -> str:
        return "str | dict"  # what --help shows


verifier_setting = _VerifierSetting()


@dataclass(frozen=True, kw_only=True)
class VerificationParams:
    """The processes that verify, beside the sampler.

    Args:
        num_workers: worker processes on each rank, at least 1.
        deadline_s: wall-clock seconds for one completion; more is TIMEOUT.
        memory_gib: address space of one worker in GiB; a completion that needs more is ERROR.
    """

    num_workers: int = 1
    deadline_s: float = 5.0
    memory_gib: float = 2.0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is not allowed.
        """
        for name in ("num_workers", "deadline_s", "memory_gib"):
            if getattr(self, name) <= 0:
                raise UserError(f"verification.{name} ({getattr(self, name)}) must be above 0")


def quiet_libraries() -> None:
    """Keeps chatter of Lightning and transformers off the screen, once they are imported."""
    for name in ("lightning.pytorch", "lightning.fabric"):  # their import sets the level anew
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def add_policy_settings(parser: ArgumentParser, *, without: Iterable[str] = ()) -> None:
    """Adds what every verb that samples needs: policy, prompt, verifier, sampling, engine.

    Args:
        parser: gets the options.
        without: names of SamplingParams that the verb sets itself.
    """
    parser.add_argument(
        "--policy",
        type=str,
        default="embedded",
        help="Folder in Hugging Face layout, hub id, or one of the package's small models: "
        "`embedded` (word problems), `embedded_code` (small functions).",
    )
    parser.add_argument(
        "--prompt",
        type=PromptTemplate,
        default={
            "class_path": "restem_lightning.prompts.FewShotPrompt",
            "init_args": {"question_format": "Q: {question}\nA:\n", "answer_format": "{answer}"},
        },
        help="How a problem is put to the policy: a class with `render(problem, tokenizer)`.",
    )
    parser.add_argument("--verifier", type=verifier_setting, default="math", help=VERIFIER_HELP)
    parser.add_class_arguments(SamplingParams, "sampling", skip=set(without))
    parser.add_class_arguments(EngineParams, "engine")
    parser.add_class_arguments(VerificationParams, "verification")


def resolve_policy(policy: str, *, setting: str = "policy") -> str:
    """Returns the folder of a policy, fetching it from the hub if it names no folder.

    Args:
        policy: folder, hub id, or name of an embedded one.
        setting: that names it, for the message.

    Raises:
        UserError: there is no such folder or repository, or it is not a whole policy.
    """
    folder = EMBEDDED_POLICIES.get(policy) or Path(policy)
    if not folder.exists() and policy.count("/") <= 1 and not policy.startswith((".", "/")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            folder = Path(snapshot_download(policy))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{setting} ({policy}) is no folder, and the hub does not give it ({reason}); give "
                "the path of a folder in Hugging Face layout"
            ) from error
    check_policy_folder(folder)
    return str(folder)


def open_verifiers(value: str | dict[str, Any], params: VerificationParams) -> VerifierPool:
    """Returns the running pool of a verifier."""
    return VerifierPool(
        verifier_spec(value),
        num_workers=params.num_workers,
        deadline_s=params.deadline_s,
        memory_bytes=int(params.memory_gib * 2**30),
    )
