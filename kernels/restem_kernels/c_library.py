"""The C functions of `native/`: compiled when first used, kept in the user's cache folder.

A compiler takes some seconds once for each type of number, and again after the sources, the
compiler or the processor have changed. OpenMP's threads are those of the runtime that torch has
loaded: two runtimes would keep two teams of threads busy on the same cores.
"""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "native"
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi")
DTYPES = {torch.float32: (), torch.bfloat16: ("-DBFLOAT16",)}
COMPILE_S = 120  # a compiler that takes longer is given up


class NoCompiler(RuntimeError):
    """The C functions cannot be had here; the message says why."""


@functools.cache
def load(dtype: torch.dtype) -> ctypes.CDLL:
    """Returns the library for numbers of a type.

    Raises:
        NoCompiler: if there is none for this type, or it cannot be compiled and loaded here.
    """
    if dtype not in DTYPES:
        raise NoCompiler(f"there are no C functions for {dtype}")
    try:
        return ctypes.CDLL(str(_compiled(DTYPES[dtype])))
    except OSError as error:
        raise NoCompiler(f"the compiled C functions cannot be loaded: {error}") from None


def _compiled(defines: tuple[str, ...]) -> Path:
    """Returns the path of a library, compiled if there is none yet."""
    command = [*_compiler(), *FLAGS, *defines]
    sources = sorted(SOURCES.glob("*.[ch]"))
    runtime = _openmp_runtime()
    known_by = [*command, runtime, _run([command[0], "--version"]), _processor()]
    digest = hashlib.sha256("\0".join(known_by).encode())
    for source in sources:
        digest.update(source.read_bytes())
    target = _cache_folder() / f"{digest.hexdigest()[:24]}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent)
    except OSError as error:
        raise NoCompiler(f"{error}; set XDG_CACHE_HOME to a folder for compiled code") from None
    os.close(handle)
    try:
        files = [str(source) for source in sources if source.suffix == ".c"]
        _run([*command, "-o", name, *files, runtime, "-lm"])
        os.replace(name, target)  # whole or not at all, however many processes compile
    finally:
        Path(name).unlink(missing_ok=True)
    return target


def _compiler() -> list[str]:
    """Returns the command of the C compiler, that of CC first."""
    chosen = shlex.split(os.environ.get("CC", ""))
    for command in [chosen] if chosen else [["gcc"], ["cc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    name = chosen[0] if chosen else "gcc, cc or clang"
    raise NoCompiler(f"there is no C compiler ({name}); install gcc or set CC")


def _openmp_runtime() -> str:
    """Returns the path of the OpenMP runtime in this process, which is torch's."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        raise NoCompiler("the C functions need Linux") from None
    found = re.search(r"/\S*/lib(gomp|iomp5|omp)[-.]\S*", maps)
    if not found:
        raise NoCompiler("torch has loaded no OpenMP runtime")
    return found[0]


def _processor() -> str:
    """Returns what -march=native depends on."""
    flags = re.search(r"^(flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return platform.machine() + (flags[0] if flags else platform.processor())


def _cache_folder() -> Path:
    """Returns where libraries are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "restem_kernels"


def _run(command: list[str]) -> str:
    """Returns the output of a command.

    Raises:
        NoCompiler: if it fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoCompiler(f"the C compiler does not run: {error}") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]
        raise NoCompiler(f"the C compiler fails ({shlex.join(command[:1])}: {reason})")
    return done.stdout
