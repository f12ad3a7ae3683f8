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
    "completion_store",
    "equations",
    "selection",
    "metrics",
    "per_iteration",
    "run_dir",
    "errors",
    "selection.pairs",
)


def modules_after(statement):
    """Returns the names of all modules that a statement leaves imported."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def modules_after_all_of(folder):
    """Returns the names of all modules that importing every file of a package leaves imported."""
    names = sorted(path.stem for path in (ROOT / folder).glob("[a-z]*.py"))
    assert names
    package = Path(folder).name if folder.startswith("kernels") else folder.replace("/", ".")
    return modules_after("\n".join(f"import {package}.{name}" for name in names))


def among(modules, *names):
    return sorted(m for m in modules if any(m == n or m.startswith(f"{n}.") for n in names))


def rooms(*names):
    return [f"restem_lightning.{name}" for name in names]


def test_the_package_alone_imports_nothing_heavy_and_is_fast():
    start = time.monotonic()
    modules = modules_after("import restem_lightning, restem_lightning.cli")
    assert not among(modules, "torch", "lightning", "transformers", "numpy", "pyarrow")
    assert time.monotonic() - start < 3.0


def test_nouns_import_neither_torch_nor_lightning():
    modules = modules_after("\n".join(f"import restem_lightning.{noun}" for noun in NOUNS))
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
    modules = modules_after_all_of("restem_lightning/sampler")
    others = rooms("verifiers", "m_step", "loop", "report", "completions", "selection")
    assert not among(modules, "lightning", "wandb", *others)


@pytest.mark.parametrize("module", ["params", "sequence", "blocks", "scheduler"])
def test_bookkeeping_of_the_sampler_is_written_without_torch(module):
    text = (ROOT / "restem_lightning" / "sampler" / f"{module}.py").read_text()
    assert "import torch" not in text
    assert "from torch" not in text


def test_m_step_imports_neither_sampler_nor_verifiers():
    modules = modules_after_all_of("restem_lightning/m_step")
    assert not among(modules, "wandb", *rooms("sampler", "verifiers", "loop", "report"))


def test_report_imports_no_training_code():
    modules = modules_after("import restem_lightning.report.html")
    assert not among(modules, "torch", "lightning", *rooms("sampler", "m_step", "loop"))


def test_kernels_import_nothing_of_the_package():
    modules = modules_after_all_of("kernels/restem_kernels")
    assert not among(modules, "restem_lightning", "lightning", "transformers")


def test_importing_the_loop_changes_nothing_and_needs_no_optional_library():
    modules = modules_after(
        "import os, torch, lightning.pytorch, transformers\n"  # they do set variables
        "before = dict(os.environ)\n"
        "import restem_lightning.fit, restem_lightning.commands\n"
        "assert dict(os.environ) == before\n"
        "assert not torch.cuda.is_initialized()"
    )
    assert not among(modules, "wandb", "flash_attn", "reasoning_gym", "datasets", "peft")


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
