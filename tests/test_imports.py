"""Who may import what; each statement runs in an interpreter of its own."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOUNS = (
    "problems",
    "prompts",
    "completions",
    "equations",
    "selection",
    "metrics",
    "per_iteration",
    "run_dir",
    "errors",
    "selection.pairs",
)
SAMPLER = (
    "params",
    "sequence",
    "blocks",
    "scheduler",
    "batch",
    "lanes",
    "kv_cache",
    "attention",
    "fused",
    "runner",
    "weights",
    "generation",
    "engine",
)
M_STEP = (
    "attention",
    "datamodule",
    "export",
    "fsdp",
    "likelihood",
    "lora",
    "loss",
    "module",
    "optimization",
    "optimizer_state",
    "packing",
    "preference",
    "probe",
    "sequences",
    "shards",
    "stopping",
    "weights",
)


def modules_after(statement):
    """Returns the names of all modules that a statement leaves imported."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def among(modules, *names):
    return sorted(m for m in modules if any(m == n or m.startswith(f"{n}.") for n in names))


def rooms(*names):
    return [f"restem_lightning.{name}" for name in names]


def test_the_package_alone_imports_nothing_heavy_and_is_fast():
    start = time.monotonic()
    modules = modules_after("import restem_lightning, restem_lightning.cli")
    assert not among(modules, "torch", "lightning", "transformers", "numpy", "pyarrow")
    assert time.monotonic() - start < 3.0


@pytest.mark.parametrize("noun", NOUNS)
def test_nouns_import_neither_torch_nor_lightning(noun):
    modules = modules_after(f"import restem_lightning.{noun}")
    assert not among(
        modules, "torch", "lightning", "transformers", *rooms("sampler", "m_step", "loop")
    )


def test_problems_import_no_verifier_and_no_numbers():
    modules = modules_after("import restem_lightning.problems")
    assert not among(modules, "numpy", "pyarrow", "datasets", *rooms("verifiers"))


def test_verifiers_and_their_workers_never_import_torch():
    statement = (
        "import restem_lightning.verifiers, restem_lightning.verifiers.worker\n"
        "from restem_lightning.verifiers import MathVerifier\n"
        "MathVerifier().warm_up()"
    )
    modules = modules_after(statement)
    assert not among(modules, "torch", "lightning", *rooms("sampler", "m_step", "loop"))


def test_sampler_imports_none_of_the_other_rooms():
    statement = "\n".join(f"import restem_lightning.sampler.{name}" for name in SAMPLER)
    modules = modules_after(statement)
    others = rooms("verifiers", "m_step", "loop", "report", "completions", "selection")
    assert not among(modules, "lightning", "wandb", *others)


@pytest.mark.parametrize("module", ["params", "sequence", "blocks", "scheduler"])
def test_bookkeeping_of_the_sampler_is_written_without_torch(module):
    text = (ROOT / "restem_lightning" / "sampler" / f"{module}.py").read_text()
    assert "import torch" not in text
    assert "from torch" not in text


def test_m_step_imports_neither_sampler_nor_verifiers():
    statement = "\n".join(f"import restem_lightning.m_step.{name}" for name in M_STEP)
    modules = modules_after(statement)
    assert not among(modules, "wandb", *rooms("sampler", "verifiers", "loop", "report"))


def test_report_imports_no_training_code():
    modules = modules_after("import restem_lightning.report.html")
    assert not among(modules, "torch", "lightning", *rooms("sampler", "m_step", "loop"))


def test_kernels_import_nothing_of_the_package():
    names = [path.stem for path in (ROOT / "kernels" / "restem_kernels").glob("[a-z]*.py")]
    assert "reference" in names
    statement = "\n".join(f"import restem_kernels.{name}" for name in names)
    modules = modules_after(statement)
    assert not among(modules, "restem_lightning", "lightning", "transformers")


def test_the_loop_needs_no_optional_library_and_starts_no_cuda():
    modules = modules_after(
        "import restem_lightning.fit, restem_lightning.commands, torch\n"
        "assert not torch.cuda.is_initialized()"
    )
    assert not among(modules, "wandb", "flash_attn", "reasoning_gym", "datasets", "peft")


def test_importing_sets_no_environment_variable():
    statement = (
        "import os, torch, lightning.pytorch, transformers\n"  # they do set some
        "before = dict(os.environ)\n"
        "import restem_lightning.fit, restem_lightning.commands\n"
        "assert dict(os.environ) == before"
    )
    modules_after(statement)


def test_the_folder_kernels_does_not_disturb_the_library_of_that_name():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import transformers.utils as u; u.is_kernels_available()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
