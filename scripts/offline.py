"""Packs what a GPU machine without a network lacks in pieces, and puts them together there.

    python scripts/offline.py pack pieces --policy models/SmolLM2-135M-Instruct --gsm8k data/gsm8k
    python scripts/offline.py pack pieces --only ours --python 3.12
    python scripts/offline.py unpack pieces --to /tmp/offline

`pack` writes an archive for each of

    ours      packages that restem needs beside torch, triton, transformers, lightning and pyarrow
    vllm      vLLM 0.26.0, of torch 2.11: what dense models in bfloat16 on Hopper need of it
    trl       TRL with what it needs beside the above
    policy    the folder of --policy
    gsm8k     the folder of --gsm8k (train.jsonl.gz and test.jsonl.gz)

cut into pieces of at most --piece-mib, so that each call to a machine with limits can bring some.
Wheels come from pip's index, for x86-64 Linux and the Python of the other machine. `unpack` keeps
the pieces it is given and makes a folder of each archive that is whole, so it can be called with
each delivery; gpu_suite.sh does that with the folder pieces/. It needs nothing but Python there.
"""

import argparse
import fnmatch
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path

OURS = ["jsonargparse==4.53.0", "docstring-parser==0.18.0", "typeshed-client==2.15.0"]
TRL = ["trl==1.16.0", "datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19"]
VLLM = [  # and what of its needs is not there, as far as the LLM class and dense models import it
    "vllm==0.26.0", "annotated-types==0.8.0", "apache-tvm-ffi==0.1.15.post2", "cachetools==8.0.2",
    "cbor2==6.3.0", "fastapi==0.165.0", "httpcore2==2.16.2", "httpx2==2.16.2", "llguidance==1.9.1",
    "msgspec==0.22.0", "openai==3.57.0", "openai-harmony==0.0.8", "opentelemetry-api==1.45.2",
    "partial-json-parser==0.2.1.1.post7", "pybase64==1.5.1", "pydantic==2.14.4",
    "pydantic-core==2.50.5", "pyzmq==27.3.0", "sniffio==1.3.1", "starlette==1.10.0",
    "truststore==0.10.5", "typing-inspection==0.4.5", "xgrammar==0.2.7",
]  # fmt: skip
WHEELS = {"ours": OURS, "vllm": VLLM, "trl": TRL}
# FlashAttention 2, mixtures of experts and the front end in Rust: vLLM does without them.
UNNEEDED = [
    "vllm/vllm-rs", "vllm/_moe_C*", "vllm/_qutlass_C*", "vllm/_rust_*", "vllm/_flashmla*",
    "vllm/vllm_flash_attn/_vllm_fa2_C*", "vllm/third_party/deep_gemm/*", "*/tests/*",
]  # fmt: skip
GLIBC = (5, 12, 17, 24, 27, 28, 31, 34, 35)  # pip takes a wheel of exactly these, so all are named


def fetch(requirements: list[str], python: str, folder: Path) -> None:
    """Unpacks the wheels of requirements, and of nothing that they require, into a folder."""
    with tempfile.TemporaryDirectory() as wheels:
        platforms = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC]
        platforms += ["manylinux2014_x86_64", "manylinux1_x86_64"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", wheels]
        command += ["--no-deps", "--only-binary=:all:"]
        command += ["--implementation", "cp", "--python-version", python]
        command += [word for name in platforms for word in ("--platform", name)]
        subprocess.run([*command, *requirements], check=True)
        for wheel in sorted(Path(wheels).iterdir()):
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if not any(fnmatch.fnmatch(name, pattern) for pattern in UNNEEDED):
                        archive.extract(name, folder)


def pack(folder: Path, name: str, pieces: Path, piece_bytes: int) -> list[Path]:
    """Writes an archive of a folder in pieces; returns them."""
    for old in pieces.glob(f"{name}.tar.xz.*"):
        old.unlink()
    with tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w:xz", preset=2) as archive:
            archive.add(folder, arcname=".")
        size = file.tell()
        file.seek(0)
        num_pieces = -(-size // piece_bytes)
        paths = [pieces / f"{name}.tar.xz.{n}of{num_pieces}" for n in range(1, num_pieces + 1)]
        for path in paths:
            path.write_bytes(file.read(-(-size // num_pieces)))
    return paths


def unpack(pieces: Path, to: Path) -> None:
    """Adds pieces to those that are there, and unpacks each archive that is whole."""
    kept = to / "pieces"
    kept.mkdir(parents=True, exist_ok=True)
    for path in pieces.glob("*.tar.xz.*of*"):
        shutil.copy(path, kept)
    archives: dict[tuple[str, int], dict[int, Path]] = defaultdict(dict)
    for path in kept.iterdir():
        name, number, count = re.fullmatch(r"(.+)\.tar\.xz\.(\d+)of(\d+)", path.name).groups()
        archives[name, int(count)][int(number)] = path
    for (name, count), found in sorted(archives.items()):
        if missing := [number for number in range(1, count + 1) if number not in found]:
            print(f"{name}: waits for {', '.join(map(str, missing))} of {count}")
        elif not (to / name).exists():
            with tempfile.TemporaryFile() as file:
                for _, path in sorted(found.items()):
                    file.write(path.read_bytes())
                file.seek(0)
                with tarfile.open(fileobj=file, mode="r:xz") as archive:
                    archive.extractall(to / f"{name}.part", filter="data")
            (to / f"{name}.part").rename(to / name)
            print(f"{name}: in {to / name}")


def main() -> None:
    """Packs or unpacks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    packing, unpacking = (verbs.add_parser(verb) for verb in ("pack", "unpack"))
    packing.add_argument("pieces", type=Path, help="folder to write to")
    packing.add_argument("--only", choices=[*WHEELS, "policy", "gsm8k"], nargs="+")
    packing.add_argument("--policy", type=Path)
    packing.add_argument("--gsm8k", type=Path)
    packing.add_argument("--python", default="3.12", help="version of the other machine's")
    packing.add_argument("--piece-mib", type=float, default=48)
    unpacking.add_argument("pieces", type=Path, help="folder to read from")
    unpacking.add_argument("--to", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.verb == "unpack":
        unpack(arguments.pieces, arguments.to)
        return
    folders = {"policy": arguments.policy, "gsm8k": arguments.gsm8k}
    arguments.pieces.mkdir(parents=True, exist_ok=True)
    for name in arguments.only or [*WHEELS, *(name for name in folders if folders[name])]:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            if name in WHEELS:
                fetch(WHEELS[name], arguments.python, folder)
            elif folders[name] is None or not folders[name].is_dir():
                parser.error(f"--{name} ({folders[name]}) must be a folder to pack {name}")
            else:
                folder = folders[name]
            for path in pack(folder, name, arguments.pieces, int(arguments.piece_mib * 2**20)):
                print(f"{path} {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
