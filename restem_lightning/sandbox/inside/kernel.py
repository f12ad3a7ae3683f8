"""System calls that the standard library does not offer, and facts about this machine's kernel."""

import ctypes
import os
import platform

CLONE_NEWNS = 0x0002_0000
CLONE_NEWUTS = 0x0400_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWUSER = 0x1000_0000
CLONE_NEWPID = 0x2000_0000
CLONE_NEWNET = 0x4000_0000
CLONE_THREAD = 0x0001_0000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
MNT_DETACH = 2

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2

MACHINE = platform.machine()
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

# These have one number on all architectures.
SYS_MOUNT_SETATTR = 442
SYS_LANDLOCK_CREATE_RULESET = 444
SYS_LANDLOCK_ADD_RULE = 445
SYS_LANDLOCK_RESTRICT_SELF = 446
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYS_CAPSET = {"x86_64": 126, "aarch64": 91}


def unshare(flags: int) -> None:
    """Puts this process (for CLONE_NEWPID its children) into new namespaces."""
    _check("unshare", _libc.unshare(ctypes.c_int(flags)))


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """Adds to the mount tree, or changes what is there."""
    words = (source.encode(), target.encode(), kind.encode())
    _check(f"mount {target}", _libc.mount(*words, ctypes.c_ulong(flags), options.encode()))


def unmount(target: str) -> None:
    """Takes a mount away at once, busy or not."""
    _check(f"umount {target}", _libc.umount2(target.encode(), MNT_DETACH))


def pivot_root() -> None:
    """Makes the working directory the root and lets go of the old root."""
    syscall(_SYS_PIVOT_ROOT[MACHINE], b".", b".")
    unmount(".")
    os.chdir("/")


def prctl(option: int, value: int, pointer: object = None) -> None:
    """Changes a property of this process."""
    zero = ctypes.c_ulong(0)
    result = _libc.prctl(option, ctypes.c_ulong(value), pointer or zero, zero, zero)
    _check(f"prctl {option}", result)


def drop_capabilities() -> None:
    """Empties all capability sets of this process; nothing it runs can get them back."""
    header = (ctypes.c_uint32 * 2)(0x2008_0522, 0)
    syscall(_SYS_CAPSET[MACHINE], header, (ctypes.c_uint32 * 6)())


def syscall(number: int, *arguments: object) -> int:
    """Returns what a system call returns; whole numbers are passed as 64 bits.

    Raises:
        OSError: the kernel refuses.
    """
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    return _check(f"syscall {number}", _libc.syscall(ctypes.c_long(number), *words))


def _check(what: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result
