"""Landlock: which files a program may read where there are no namespaces (kernel 5.13 or later)."""

import contextlib
import ctypes
import os
import struct

from .kernel import (
    SYS_LANDLOCK_ADD_RULE,
    SYS_LANDLOCK_CREATE_RULESET,
    SYS_LANDLOCK_RESTRICT_SELF,
    syscall,
)

_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
_EXECUTE, _READ_FILE, _READ_DIR = 1, 4, 8
# File-system rights by ABI version; the kernel refuses bits that it does not know.
_FILE_RIGHTS = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF, 5: 0xFFFF}
_NETWORK_RIGHTS = 0b11  # TCP bind and connect, from version 4
_SCOPES = 0b11  # abstract unix sockets and signals, from version 6


def abi_version() -> int:
    """Returns the kernel's Landlock version.

    Raises:
        OSError: it has none, or it is switched off.
    """
    return syscall(SYS_LANDLOCK_CREATE_RULESET, 0, 0, _CREATE_RULESET_VERSION)


def make_ruleset(readable: list[str]) -> int:
    """Returns the descriptor of a ruleset that allows reading below some paths, and nothing else.

    Raises:
        OSError: the kernel has no Landlock.
    """
    version = abi_version()
    words = [_FILE_RIGHTS[min(version, 5)]]
    words += [_NETWORK_RIGHTS] if version >= 4 else []
    words += [_SCOPES] if version >= 6 else []
    attributes = struct.pack(f"{len(words)}Q", *words)
    ruleset = syscall(SYS_LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    for path in readable:
        with contextlib.suppress(FileNotFoundError, PermissionError):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = struct.pack("=Qi", _EXECUTE | _READ_FILE | _READ_DIR, place)
            syscall(SYS_LANDLOCK_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.c_char_p(rule), 0)
            os.close(place)
    return ruleset


def restrict_self(ruleset: int) -> None:
    """Puts this process under a ruleset for good; it must have no_new_privs."""
    syscall(SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0)
