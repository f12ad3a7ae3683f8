"""The run folder: its paths, atomic writes, the settings it was begun with, where to resume."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import secrets
import subprocess
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from restem_lightning import __version__
from restem_lightning.errors import UserError

TEMP_SUFFIX = ".restem-tmp"


class IterationDir:
    """Paths of one iteration's folder."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Keeps the folder.

        Args:
            path: `run_dir/iteration_<t>`; it need not exist yet.
        """
        self.path = Path(path)
        self.completions = self.path / "completions"
        self.accepted = self.path / "accepted.parquet"
        self.funnel = self.path / "funnel.json"
        self.m_step = self.path / "m_step"
        self.policy = self.path / "policy"
        self.optimizer = self.path / "optimizer.pt"
        self.verifier = self.path / "verifier"
        self.verifier_training = self.path / "verifier_training"
        self.verifier_json = self.path / "verifier.json"
        self.memory = self.path / "memory_mib.json"
        self.metrics = self.path / "metrics.json"
        self.manifest = self.path / "manifest.json"


class RunDir:
    """Paths of a run's folder, and how far the run has come."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Keeps the folder.

        Args:
            path: the run folder; it need not exist yet.
        """
        self.path = Path(os.path.expanduser(path))  # Lightning does so with that of checkpoints
        self.run_json = self.path / "run.json"
        self.lock = self.path / ".lock"
        self.report = self.path / "report.html"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other processes out of the folder until the block or this process ends.

        Rank 0 alone takes the lock. Where the file system has none for files that are only read,
        as NFS, there is none: a file open for writing would keep a disk from being remounted.

        Raises:
            UserError: another process has it, or the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock.touch()
            file = self.lock.open()
        except OSError as error:
            raise _unwritable(self.path, error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"run_dir ({self.path}) must be free, and another process works in it; wait "
                    "for its end or stop it, or give another --run_dir"
                ) from None
            except OSError:
                pass
            yield

    def iteration(self, iteration: int) -> IterationDir:
        """Returns the paths of an iteration; 0 is the base model, measured but not trained."""
        return IterationDir(self.path / f"iteration_{iteration}")

    def iterations(self) -> list[int]:
        """Returns the numbers of all iteration folders, finished or not, in order."""
        names = [path.name.removeprefix("iteration_") for path in self.path.glob("iteration_*")]
        return sorted(int(name) for name in names if name.isdecimal())

    def finished_iterations(self) -> list[int]:
        """Returns 1, 2, ... up to the last iteration before the first one without a manifest."""
        finished: list[int] = []
        while self.iteration(len(finished) + 1).manifest.exists():
            finished.append(len(finished) + 1)
        return finished

    def resume_iteration(self) -> int:
        """Returns the iteration to work on next: the first one without a manifest."""
        return len(self.finished_iterations()) + 1

    def update_run(self, *, wandb_run_id: str) -> None:
        """Records the W&B run in run.json, so that a resumed run goes on in it."""
        write_json(self.run_json, {**read_json(self.run_json), "wandb_run_id": wandb_run_id})


def open_run(
    path: str | os.PathLike[str], settings: dict[str, Any], *, free: tuple[str, ...] = ()
) -> RunDir:
    """Begins a run in a folder, or resumes the one that is there; rank 0 alone may call it.

    Args:
        path: the run folder, created if missing.
        settings: all settings of the run, JSON-serialisable; `settings["seed"]` is its seed.
        free: dotted keys, or prefixes of dotted keys, that may differ on resume, such as
            "trainer.devices".

    Raises:
        UserError: the settings differ from those of the run in the folder, or the folder cannot
            be read or written.
    """
    run = RunDir(path)
    try:
        if run.run_json.exists():
            record = read_json(run.run_json)
            refuse_changes(
                record["settings"],
                settings,
                begun=str(run.run_json),
                remedy="give another --run_dir, or the old value",
                free=free,
            )
            _remove_leftovers(run.path)
            record["resumed"].append(_origin())
        else:
            record = {
                "settings": settings,
                "settings_hash": settings_hash(settings),
                "seed": settings.get("seed"),
                "wandb_run_id": None,
                **_origin(),
                "resumed": [],
            }
        write_json(run.run_json, record)
    except OSError as error:
        raise _unwritable(run.path, error) from error
    return run


def refuse_changes(
    old: dict[str, Any],
    new: dict[str, Any],
    *,
    begun: str,
    remedy: str,
    free: tuple[str, ...] = (),
) -> None:
    """Does nothing if two settings agree.

    Args:
        old: the settings on disk.
        new: the settings asked for now.
        begun: the file that holds the old settings, for the message.
        remedy: what the user can do, for the message.
        free: dotted keys, or prefixes of dotted keys, that may differ.

    Raises:
        UserError: they differ; each dotted key is named with both values.
    """
    before, now = _flatten(_as_json(old)), _flatten(_as_json(new))
    changed = [
        f"{key} was {_shown(before, key)}, now {_shown(now, key)}"
        for key in sorted(before.keys() | now.keys())
        if (key in before) != (key in now) or before[key] != now[key]
        if not any(key == prefix or key.startswith(f"{prefix}.") for prefix in free)
    ]
    if changed:
        raise UserError(f"settings differ from those in {begun}: {'; '.join(changed)}; {remedy}")


def settings_hash(settings: dict[str, Any]) -> str:
    """Returns the SHA-256 of settings as hex, independent of the order of keys."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path to write to, which becomes `path` if the block ends well.

    The file is synced, renamed, and its folder synced: after a crash `path` holds the old content
    or all of the new one. If the block raises, `path` is untouched and the temporary file removed.
    A killed process leaves a name that ends in TEMP_SUFFIX; nothing reads it, and `open_run`
    removes it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{TEMP_SUFFIX}")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    except OSError as error:
        if error.filename is None:  # neither pyarrow nor a write of Python's own names it
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Writes strict JSON to `path`, atomically.

    Raises:
        ValueError: there is a NaN or an infinity in it, which JSON does not have.
    """
    text = json.dumps(obj, indent=2, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Returns the content of a JSON file.

    Raises:
        UserError: the file is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} must be JSON: {error}; restore the file or delete it") from error


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 of a file's bytes as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"run_dir ({path}) must be a folder that can be written: {error.strerror}; mend its "
        "permissions or free disk space, or give another --run_dir"
    )


def _as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns settings as they read back from disk (tuples become lists)."""
    return json.loads(json.dumps(settings))


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Returns dotted key -> leaf; a list counts as a leaf unless it holds mappings."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = {str(index): item for index, item in enumerate(value)}
    if not isinstance(value, dict) or (not value and prefix):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(_flatten(item, f"{prefix}.{key}" if prefix else key))
    return flat


def _shown(flat: dict[str, Any], key: str) -> str:
    return json.dumps(flat[key]) if key in flat else "not set"


def _origin() -> dict[str, Any]:
    """Returns when and by which code a run is begun or resumed."""
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "restem_lightning": __version__,
            **{name: _version(name) for name in ("torch", "lightning", "transformers")},
            "python": platform.python_version(),
        },
        "git_commit": _git_commit(),
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Returns the commit of the checkout this package runs from, "-dirty" appended if changed."""
    checkout = Path(__file__).parent.parent
    if not (checkout / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None


def _remove_leftovers(folder: Path) -> None:
    """Deletes what killed processes left half-written."""
    for path in folder.rglob(f".*{TEMP_SUFFIX}"):
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Forces a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
