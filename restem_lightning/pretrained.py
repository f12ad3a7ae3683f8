"""Loading a Hugging Face folder with all of its weights."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from restem_lightning.errors import UserError


def load_whole(auto_class: Any, policy: str | Path, **options: Any) -> PreTrainedModel:
    """Returns the model of a folder, which must hold all weights: transformers makes others up.

    Args:
        auto_class: of transformers, such as AutoModelForCausalLM.
        policy: a Hugging Face folder (or hub id).
        options: for its `from_pretrained`.

    Raises:
        UserError: weights are missing.
    """
    model, loaded = auto_class.from_pretrained(policy, output_loading_info=True, **options)
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(
            f"policy ({policy}) must have all weights of its config.json; it lacks {missing[0]}"
            f"{f' and {len(missing) - 1} more' if missing[1:] else ''}; copy or download it anew"
        )
    return model
