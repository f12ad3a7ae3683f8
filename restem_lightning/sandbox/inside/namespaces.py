"""A world of its own by namespaces: own process ids, no network, a few read-only files.

No /proc, no /sys, no /dev, no /etc and no home: a program sees the standard library, the shared
libraries it needs, and a private /tmp in memory.
"""

import contextlib
import ctypes
import os
import signal
import struct
import sys
import sysconfig
from collections.abc import Callable

from .kernel import (
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    PR_SET_PDEATHSIG,
    SYS_MOUNT_SETATTR,
    mount,
    pivot_root,
    prctl,
    syscall,
    unmount,
    unshare,
)

INNER_ID = 1  # user and group inside; which real ids they stand for is the parent's choice
PRIVATE = "/tmp"
_NEW_ROOT = "/tmp"
_ALL = (
    CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
)  # fmt: skip
_NUM_INODES = 1024
_AT_RECURSIVE, _AT_FDCWD = 0x8000, -100
_READ_ONLY = MS_RDONLY | MS_NOSUID | MS_NODEV


def readable_paths() -> list[str]:
    """Returns the folders that programs may read: standard library and shared libraries."""
    stdlib = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
    shared = ["/usr/lib", "/usr/lib64", "/lib", "/lib64", os.path.join(sys.base_prefix, "lib")]
    paths: list[str] = []
    for path in dict.fromkeys(map(os.path.abspath, [*shared, *stdlib])):
        if os.path.isdir(path) and not any(path.startswith(f"{known}/") for known in paths):
            paths.append(path)
    return paths


def enter(ask_for_ids: Callable[[], None]) -> None:
    """Moves this program into new namespaces; returns in their first process.

    The calling process stays outside until the new one ends, and then exits with 0.

    Args:
        ask_for_ids: called when the user namespace is there; returns once its ids are mapped.

    Raises:
        OSError: the kernel or its policy does not allow it.
    """
    unshare(_ALL)
    ask_for_ids()
    # Opened before the change of user, who may be unable to reach them; not yet in the way.
    places = {path: os.open(path, os.O_PATH) for path in readable_paths()}
    os.setresgid(INNER_ID, INNER_ID, INNER_ID)
    os.setresuid(INNER_ID, INNER_ID, INNER_ID)
    if (child := os.fork()) != 0:
        os.closerange(3, 4096)  # only the child may keep the parent's socket open
        os.waitpid(child, 0)
        os._exit(0)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _build_root(places)


def fresh_private(size_bytes: int) -> None:
    """Gives the next program an empty private directory; whatever the last one wrote is gone.

    A directory that is still empty is as good as new: programs cannot change its mode or times.
    """
    state = os.statvfs(PRIVATE)
    if state.f_files == _NUM_INODES and state.f_ffree == _NUM_INODES - 1:
        return
    with contextlib.suppress(OSError):
        unmount(PRIVATE)
    options = f"size={size_bytes},nr_inodes={_NUM_INODES},mode=700"
    mount("tmpfs", PRIVATE, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)


def _build_root(places: dict[str, int]) -> None:
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    mount("tmpfs", _NEW_ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path, place in places.items():
        target = _NEW_ROOT + path
        if os.path.islink(path):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.symlink(os.readlink(path), target)
        else:
            os.makedirs(target)
            os.fchdir(place)
            mount(".", target, "", MS_BIND | MS_REC)
            _make_read_only(target)
        os.close(place)
    for path in places:
        _hide_packages(_NEW_ROOT + path)
    os.mkdir(_NEW_ROOT + PRIVATE)
    os.chdir(_NEW_ROOT)
    pivot_root()
    mount("none", "/", "", MS_REMOUNT | MS_BIND | _READ_ONLY)


def _make_read_only(target: str) -> None:
    """Makes a bind mount and all below it read-only, without setuid and without devices."""
    attributes = struct.pack("4Q", _READ_ONLY, 0, 0, 0)  # the three bits are those of MS_*
    try:
        syscall(
            SYS_MOUNT_SETATTR,
            _AT_FDCWD,
            ctypes.c_char_p(target.encode()),
            _AT_RECURSIVE,
            ctypes.c_char_p(attributes),
            len(attributes),
        )
    except OSError:  # before kernel 5.12; flags that the old mount has must be given again
        kept = os.statvfs(target).f_flag & (MS_NOEXEC | 1024 | 2048)  # noatime, nodiratime
        kept |= 1 << 21 if os.statvfs(target).f_flag & 4096 else 0  # relatime
        mount("none", target, "", MS_REMOUNT | MS_BIND | _READ_ONLY | kept)


def _hide_packages(folder: str) -> None:
    """Covers installed packages, which are no part of the standard library."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    inner = ("site-packages", f"{version}/site-packages", "python3/dist-packages")
    for name in inner:
        place = os.path.join(folder, name)
        if os.path.isdir(place) and not os.path.islink(folder):
            mount("tmpfs", place, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "size=4k")
