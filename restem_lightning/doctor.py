"""`restem doctor`: what works on this machine, found by trying it, each with the remedy."""

import importlib.util
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from restem_lightning.run_dir import atomic_path

State = Literal["ok", "absent", "broken"]
REQUIRED = ("torch", "lightning", "transformers", "jsonargparse", "pyarrow", "safetensors")
EXTRAS = {  # distribution -> the extra that brings it, and what it is for
    "triton": ("cuda", "the sampler's GPU kernels"),
    "flash-attn": ("cuda", "faster attention over packed sequences in the M-step"),
    "wandb": ("wandb", "tracking.wandb_project"),
    "reasoning-gym": ("procedural", "generated problems of many kinds"),
    "datasets": ("hub", "data sets by their hub id"),
    "peft": ("lora", "model.lora"),
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found.

    Args:
        name: what was checked.
        state: ok; absent (not there, and the project does without); broken (there and failing, or
            needed).
        detail: what was seen, in one line.
        remedy: what to do about it; empty where nothing is to be done.
    """

    name: str
    state: State
    detail: str
    remedy: str = ""


def examine(folder: str | Path) -> list[Finding]:
    """Returns the findings of all checks; a check that fails by itself is a finding too.

    Args:
        folder: where runs are to be written.
    """
    findings = []
    for name, check in CHECKS.items():
        try:
            findings += check(Path(folder))
        except Exception as error:  # whatever a broken installation raises is what is looked for
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            findings.append(
                Finding(name=name, state="broken", detail=reason, remedy="mend or reinstall it")
            )
    return findings


def shown(findings: list[Finding]) -> str:
    """Returns findings as lines of a table, remedies below."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:7} {finding.name:{width}}  {finding.detail}")
        if finding.remedy:
            lines.append(f"{'':7} {'':{width}}  -> {finding.remedy}")
    return "\n".join(lines)


def as_json(findings: list[Finding]) -> str:
    """Returns findings as a JSON array."""
    return json.dumps([asdict(finding) for finding in findings], indent=1)


def _packages(_: Path) -> list[Finding]:
    versions = [f"{name} {metadata.version(name)}" for name in REQUIRED]
    detail = f"Python {platform.python_version()}, {', '.join(versions)}"
    findings = [Finding(name="packages", state="ok", detail=detail)]
    for name, (extra, use) in EXTRAS.items():
        try:
            findings.append(Finding(name=name, state="ok", detail=metadata.version(name)))
        except metadata.PackageNotFoundError:
            findings.append(
                Finding(
                    name=name,
                    state="absent",
                    detail=f"not installed; it is for {use}",
                    remedy=f"pip install 'restem-lightning[{extra}]'",
                )
            )
    return findings


def _device(_: Path) -> list[Finding]:
    import torch

    from restem_lightning.sampler import EngineParams

    dtype = str(EngineParams().resolve_dtype()).removeprefix("torch.")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        gpus = ", ".join(f"{p.name} ({p.total_memory / 2**30:.0f} GiB)" for p in names)
        detail = f"{len(names)} GPU: {gpus}, CUDA {torch.version.cuda}, sampler in {dtype}"
        return [Finding(name="device", state="ok", detail=detail)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    detail = (
        f"CPU only: {cores} cores, {torch.get_num_threads()} threads, {_memory_gib():.0f} GiB, "
        f"{torch.backends.cpu.get_cpu_capability()}, sampler in {dtype}"
    )
    remedy = ""
    if shutil.which("nvidia-smi"):
        remedy = "nvidia-smi is here, and torch sees no GPU: install a CUDA build of torch"
    return [
        Finding(name="device", state="broken" if remedy else "ok", detail=detail, remedy=remedy)
    ]


def _memory_gib() -> float:
    """Returns the machine's memory; a container's own limit where it is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total / 2**30


def _kernels(_: Path) -> list[Finding]:
    """Compiles kernels: on a GPU one of Triton's, which is compared, on a CPU those in C."""
    import torch
    from restem_kernels import c_library, reference

    if not torch.cuda.is_available():
        try:
            c_library.load(torch.float32)
        except c_library.NoCompiler as error:
            return [
                Finding(
                    name="kernels",
                    state="absent",
                    detail=f"{error}; the sampler runs in torch, more slowly",
                    remedy="install gcc or clang",
                )
            ]
        detail = "no GPU: the sampler's kernels in C compile and load"
        return [Finding(name="kernels", state="ok", detail=detail)]
    from restem_kernels import gpu

    x, residual = torch.randn(2, 8, 64, device="cuda").unbind()
    weight = torch.ones(64, device="cuda")
    ours = gpu.add_rms_norm(x, weight, eps=1e-6, residual=residual)
    theirs = reference.add_rms_norm(x, weight, eps=1e-6, residual=residual)
    error = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    if error > 1e-4:
        return [
            Finding(
                name="kernels",
                state="broken",
                detail=f"a Triton kernel is off by {error:.1e}",
                remedy="report it with the versions of triton and torch and the name of the GPU",
            )
        ]
    return [Finding(name="kernels", state="ok", detail="Triton compiles and agrees with torch")]


def _fsdp(_: Path) -> list[Finding]:
    """Shards a layer over a process group of one and takes a step."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    on_gpu = torch.cuda.is_available()
    kind, backend = ("cuda", "nccl") if on_gpu else ("cpu", "gloo")
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(kind, (1,))
        layer = fully_shard(torch.nn.Linear(8, 8).to(kind), mesh=mesh)
        layer(torch.ones(1, 8, device=kind)).sum().backward()
        assert layer.weight.grad is not None
    finally:
        dist.destroy_process_group()
    detail = f"FSDP2 shards and takes a step over {backend}"
    return [Finding(name="FSDP", state="ok", detail=detail)]


def _slurm(_: Path) -> list[Finding]:
    job = os.environ.get("SLURM_JOB_ID")
    if shutil.which("sbatch") is None:
        return [
            Finding(
                name="SLURM",
                state="absent",
                detail="no sbatch on PATH",
                remedy="for several machines: run on a login node of a cluster, or use torchrun",
            )
        ]
    where = f"in job {job}" if job else "outside a job: sbatch scripts/launch.sbatch starts one"
    return [Finding(name="SLURM", state="ok", detail=f"sbatch is here, {where}")]


def _sandbox(_: Path) -> list[Finding]:
    """Attacks the walls from inside."""
    from restem_lightning.sandbox.levels import probe

    report = probe()
    state: State = "ok" if report.level in ("namespaces", "landlock") else "absent"
    detail = f"level {report.level}: {report.detail}"
    if report.level is None:
        detail = f"foreign code cannot be confined ({'; '.join(report.refusals)})"
    return [Finding(name="sandbox", state=state, detail=detail, remedy=report.remedy)]


def _wandb(_: Path) -> list[Finding]:
    if importlib.util.find_spec("wandb") is None:
        return []  # said among the packages
    mode = os.environ.get("WANDB_MODE", "online")
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    has_key = "WANDB_API_KEY" in os.environ or (
        netrc.is_file() and "wandb" in netrc.read_text(errors="replace")
    )
    if has_key or mode != "online":
        return [
            Finding(name="W&B", state="ok", detail=f"mode {mode}, {'a' if has_key else 'no'} key")
        ]
    return [
        Finding(
            name="W&B",
            state="absent",
            detail="no API key",
            remedy="`wandb login`, or --tracking.wandb_mode offline and `wandb sync` later",
        )
    ]


def _run_folder(folder: Path) -> list[Finding]:
    """Writes a file as the loop does: beside its place, synced, renamed."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    try:
        with (
            tempfile.TemporaryDirectory(dir=existing, prefix=".restem-doctor-") as name,
            atomic_path(Path(name) / "probe") as path,
        ):
            path.write_text("probe")
    except OSError as error:
        return [
            Finding(
                name="run folder",
                state="broken",
                detail=f"{existing}: {error.strerror}",
                remedy="free space or mend the permissions, or write runs elsewhere (--run_dir)",
            )
        ]
    free = shutil.disk_usage(existing).free / 2**30
    detail = f"{existing} takes files, {free:.0f} GiB free"
    remedy = "" if free > 5 else "`restem plan` says what a run takes; free space"
    return [
        Finding(
            name="run folder", state="ok" if free > 5 else "broken", detail=detail, remedy=remedy
        )
    ]


CHECKS: dict[str, Callable[[Path], list[Finding]]] = {
    "packages": _packages,
    "device": _device,
    "kernels": _kernels,
    "FSDP": _fsdp,
    "sandbox": _sandbox,
    "SLURM": _slurm,
    "W&B": _wandb,
    "run folder": _run_folder,
}


def exit_status(findings: list[Finding]) -> int:
    """Returns 1 if anything is broken, else 0."""
    return int(any(finding.state == "broken" for finding in findings))
