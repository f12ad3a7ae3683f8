"""Every kernel compiles for A100 and H100 without either, and fits their processors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton.backends import backends

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("nvidia" not in backends, reason="this triton was built without CUDA"),
]
WORKER = Path(__file__).with_name("compile_worker.py")
# Shared memory that one program can have.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
# Spilled registers of a thread: a few values that wait while a loop runs. Tiles are cut for H100.
STACK_BYTES = {80: 160, 90: 32}


@pytest.fixture(scope="module", params=SHARED_BYTES)
def arch(request):
    return request.param


@pytest.fixture(scope="module")
def lines(arch, tmp_path_factory):
    """Returns what the worker says of each kernel, and the names of all there are."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, WORKER, str(arch)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles(lines):
    *compiled, names = lines
    assert [line for line in compiled if "error" in line] == []
    assert {line["kernel"] for line in compiled} == set(names["kernels"])


def test_shared_memory_suffices(lines, arch):
    too_large = [line for line in lines if line.get("shared", 0) > SHARED_BYTES[arch]]
    assert too_large == []


def test_loops_spill_no_registers(lines, arch):
    # float32 is for tests: its matrix products do without tensor cores, and nobody waits for them.
    spilled = [
        line
        for line in lines
        if line.get("STACK", 0) > STACK_BYTES[arch] and "float32" not in line["case"]
    ]
    assert spilled == []
