"""The system-call filter of every program: one process, no network, no other process in reach.

A BPF program by hand, so that no library is needed. What is not named here is allowed, except
system calls newer than the list (424 and up), which do not exist for the program unless named.
"""

import ctypes
import errno
import struct

from .kernel import CLONE_THREAD, MACHINE, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, prctl

# name: (number on x86_64, number on aarch64); None where there is none.
_DENIED = {
    # Other processes: none are made, none are touched.
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "kcmp": (312, 272),
    "setpriority": (141, 140), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118),
    "sched_setattr": (314, 274), "sched_setaffinity": (203, 122), "ioprio_set": (251, 30),
    "migrate_pages": (256, 238), "move_pages": (279, 239),
    # The network; socketpair has a rule of its own.
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "accept": (43, 202), "accept4": (288, 242),
    # Memory and messages that outlive the program or escape its limits.
    "memfd_create": (319, 279), "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195),
    "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191), "msgget": (68, 186),
    "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    # Namespaces, mounts, and doors into the kernel.
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "bpf": (321, 280), "userfaultfd": (323, 282),
    "perf_event_open": (298, 241), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "sethostname": (170, 161), "setdomainname": (171, 162), "syslog": (103, 116),
    "acct": (163, 89), "quotactl": (179, 60), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "iopl": (172, None), "ioperm": (173, None),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "personality": (135, 92), "fanotify_init": (300, 262),
    "vhangup": (153, 58), "modify_ldt": (154, None), "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    # Changes to files that need no open file, which Landlock does not cover.
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None),
    "fchown": (93, 55), "fchownat": (260, 54), "lchown": (94, None), "utime": (132, None),
    "utimes": (235, None), "utimensat": (280, 88), "futimesat": (261, None),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
}  # fmt: skip
# Denied too where there is no private file system to write to.
_WRITES = {
    "truncate": (76, 45), "creat": (85, None), "mkdir": (83, None), "mkdirat": (258, 34),
    "mknod": (133, None), "mknodat": (259, 33), "rename": (82, None), "renameat": (264, 38),
    "renameat2": (316, 276), "link": (86, None), "linkat": (265, 37), "symlink": (88, None),
    "symlinkat": (266, 36), "unlink": (87, None), "unlinkat": (263, 35), "rmdir": (84, None),
}  # fmt: skip
_ALLOWED_NEW = (436, 439, 441, 449, 454, 455, 456)  # close_range, faccessat2, epoll, futexes
_OPENAT2, _CLONE3, _FIRST_NEW = 437, 435, 424
_CLONE, _PRCTL, _FCNTL, _IOCTL = (56, 220), (157, 167), (72, 25), (16, 29)
_PRLIMIT, _SOCKETPAIR, _OPEN, _OPENAT = (302, 261), (53, 199), (2, None), (257, 56)

_WRITE_FLAGS = 0o1 | 0o2 | 0o100 | 0o1000 | 0o20000000  # O_WRONLY O_RDWR O_CREAT O_TRUNC O_TMPFILE
_PR_SET_PDEATHSIG = 1
_OWNER_COMMANDS = (8, 15)  # F_SETOWN, F_SETOWN_EX: a signal to any process of the same user
_OWNER_IOCTLS = (0x5412, 0x8901, 0x8902)  # TIOCSTI, FIOSETOWN, SIOCSPGRP

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF_0000, 0x8000_0000, 0x0005_0000
_ARCHITECTURES = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}
_X32_BIT = 0x4000_0000


def build_filter(*, is_writable: bool) -> object:
    """Returns the filter program of this machine, to be installed by `install_filter`.

    Args:
        is_writable: whether programs have a private directory that they may write to.

    Raises:
        OSError: there is no filter for this architecture.
    """
    if MACHINE not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no system-call filter for {MACHINE}")
    column = tuple(_ARCHITECTURES).index(MACHINE)
    denied = _ret(_ERRNO | errno.EPERM)
    names = _DENIED if is_writable else _DENIED | _WRITES
    code = [
        (_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _ARCHITECTURES[MACHINE]), _ret(_KILL),
        (_LOAD, 0, 0, 0), (_AT_LEAST, 0, 1, _X32_BIT), denied,
    ]  # fmt: skip
    for numbers in names.values():
        code += _if_call(numbers[column], [denied])
    code += _if_call(_CLONE[column], [_argument(0), (_ANY_BIT, 1, 0, CLONE_THREAD), denied])
    code += _if_call(_PRLIMIT[column], [_argument(0), (_EQUAL, 1, 0, 0), denied])
    code += _if_call(_SOCKETPAIR[column], [_argument(0), (_EQUAL, 1, 0, 1), denied])
    code += _if_call(_PRCTL[column], [_argument(0), (_EQUAL, 0, 1, _PR_SET_PDEATHSIG), denied])
    for call, values in ((_FCNTL, _OWNER_COMMANDS), (_IOCTL, _OWNER_IOCTLS)):
        tests = [line for value in values for line in ((_EQUAL, 0, 1, value), denied)]
        code += _if_call(call[column], [_argument(1), *tests])
    allowed_new = _ALLOWED_NEW
    if is_writable:
        allowed_new = (*_ALLOWED_NEW, _OPENAT2)
    else:
        for call, index in ((_OPEN, 1), (_OPENAT, 2)):
            tests = [_argument(index), (_ANY_BIT, 0, 1, _WRITE_FLAGS), denied]
            code += _if_call(call[column], tests)
    for number in allowed_new:
        code += _if_call(number, [_ret(_ALLOW)])
    code += [(_AT_LEAST, 0, 1, _FIRST_NEW), _ret(_ERRNO | errno.ENOSYS), _ret(_ALLOW)]
    program = b"".join(struct.pack("HBBI", *line) for line in code)
    body = ctypes.create_string_buffer(program, len(program))
    return _Program(len(code), ctypes.cast(body, ctypes.c_void_p), body)


class _Program(ctypes.Structure):
    """A struct sock_fprog that keeps its instructions alive."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    def __init__(self, length: int, pointer: ctypes.c_void_p, body: object) -> None:
        super().__init__(length, pointer)
        self.body = body


def install_filter(program: object) -> None:
    """Puts this process under a filter for good; it must have no_new_privs and one thread."""
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program))


def _ret(value: int) -> tuple[int, int, int, int]:
    return (_RETURN, 0, 0, value)


def _argument(index: int) -> tuple[int, int, int, int]:
    """Loads the low 32 bits of an argument; all arguments tested here are that wide."""
    return (_LOAD, 0, 0, 16 + 8 * index)


def _if_call(number: int | None, body: list) -> list:
    """Runs `body`, then allows the call, if the number (in the accumulator) is this one."""
    if number is None:
        return []
    if body[-1][0] != _RETURN or len(body) > 1:
        body = [*body, _ret(_ALLOW)]
    return [(_EQUAL, 0, len(body), number), *body]
