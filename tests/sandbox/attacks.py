"""Programs that want out: each has an `attack()` that returns True if it achieved something.

Names in capitals (CANARY, FOLDER, PORT, SOCKET, ABSTRACT, CALLER) are set before the program.
`call(number, ...)` makes a system call of x86-64 by its number and returns its result.
"""

PREFIX = """
import ctypes, errno, os, signal, socket, subprocess, sys, threading, time
def call(*words):
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return libc.syscall(*[ctypes.c_long(w) if isinstance(w, int) else w for w in words])
def add(a, b):
    try:
        return a + b if attack() else None
    except (OSError, MemoryError, ImportError, AttributeError, RuntimeError):
        return None
"""

ATTACKS = {
    # Files.
    "read the canary": "return bool(open(CANARY).read())",
    "write the canary": "return open(CANARY, 'w').write('x')",
    "append to the canary": "return os.write(os.open(CANARY, os.O_WRONLY | os.O_APPEND), b'x')",
    "truncate the canary": "os.truncate(CANARY, 0)\nreturn True",
    "truncate by opening": "os.open(CANARY, os.O_RDONLY | os.O_TRUNC)\nreturn True",
    "remove the canary": "os.unlink(CANARY)\nreturn True",
    "rename the canary": "os.rename(CANARY, CANARY + 'x')\nreturn True",
    "change the canary's mode": "os.chmod(CANARY, 0)\nreturn True",
    "change the canary's owner": "os.chown(CANARY, os.getuid(), -1)\nreturn True",
    "change the canary's times": "os.utime(CANARY, (0, 0))\nreturn True",
    "change the canary's attributes": "os.setxattr(CANARY, 'user.x', b'x')\nreturn True",
    "link the canary": "os.link(CANARY, 'link')\nreturn True",
    "write through a symbolic link": (
        "os.symlink(CANARY, 'link')\nreturn open('link', 'w').write('x')"
    ),
    "write beside the canary": "return open(FOLDER + '/new', 'w').write('x')",
    "make a folder beside": "os.mkdir(FOLDER + '/new')\nreturn True",
    "make a device": "os.mknod('device', 0o60666, os.makedev(7, 0))\nreturn open('device', 'rb')",
    "climb with dots": "return open('/tmp' + '/..' * 20 + CANARY).read()",
    "climb out of a root": (
        "os.mkdir('r')\nd = os.open('/', os.O_RDONLY)\nos.chroot('r')\nos.fchdir(d)\n"
        "for _ in range(20): os.chdir('..')\nos.chroot('.')\nreturn open(CANARY).read()"
    ),
    "write at the root": "return open('/new', 'w').write('x')",
    "write in the library": "return open(os.__file__ + 'x', 'w').write('x')",
    "poison the library": "return open(os.__file__, 'a').write('x')",
    "poison a module's cache": ("import random\nreturn open(random.__cached__, 'r+b').write(b'x')"),
    "read the users": "return open('/etc/passwd').read()",
    "read homes": (
        "names = ['/root/' + name for name in os.listdir('/root')]\n"
        "return [x for x in names if not sys.base_prefix.startswith(x)] or os.listdir('/home')"
    ),
    "find problems on disk": (
        "found = [f for p in ('/work', '/data', FOLDER, '/home', '/root/.cache')\n"
        "         if os.path.isdir(p) for f in os.listdir(p)]\nreturn found"
    ),
    "open by handle": "return call(304, -100, ctypes.create_string_buffer(200), 0) >= 0",
    "kernel messages": "return open('/dev/kmsg').read(1)",
    "physical memory": "return open('/dev/mem', 'rb').read(1)",
    # The network.
    "connect to the port": "socket.socket().connect((b'127.0.0.1', PORT))\nreturn True",
    "connect by IPv6": "socket.socket(socket.AF_INET6).connect((b'::1', PORT))\nreturn True",
    "send a datagram": (
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', (b'127.0.0.1', PORT))\n"
        "return True"
    ),
    "multipath TCP": "socket.socket(2, 1, 262).connect((b'127.0.0.1', PORT))\nreturn True",
    "raw packets": "return socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "netlink": "return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "unix socket": "socket.socket(socket.AF_UNIX).connect(SOCKET)\nreturn True",
    "abstract socket": "socket.socket(socket.AF_UNIX).connect('\\0' + ABSTRACT)\nreturn True",
    "unix datagram from a pair": (
        "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "a.sendto(b'x', SOCKET)\nreturn True"
    ),
    "resolve a name": "return socket.getaddrinfo('localhost', 80) and socket.socket()",
    "listen": "s = socket.socket()\ns.bind((b'', 0))\ns.listen()\nreturn True",
    # Other processes.
    "fork": "return os.fork() >= 0 or True",
    "fork bomb": (
        "import posix\nfor _ in range(500):\n    if posix.fork() == 0: time.sleep(60)\nreturn True"
    ),
    "fork by system call": "return call(57) >= 0",
    "vfork": "return call(58) >= 0",
    "clone": "return call(56, 17, 0, 0, 0, 0) >= 0",
    "clone3": ("args = (ctypes.c_uint64 * 11)(0, 0, 0, 0, 17)\nreturn call(435, args, 88) >= 0"),
    "orphan": (
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(60)\n"
        "    os._exit(0)\nreturn True"
    ),
    "run a shell": "return os.system('true') == 0",
    "run a process": "return subprocess.run(['/bin/true']).returncode == 0",
    "spawn": "return os.posix_spawn('/bin/true', ['true'], {})",
    "multiprocessing": (
        "import multiprocessing\np = multiprocessing.get_context('fork').Process(target=print)\n"
        "p.start()\nreturn True"
    ),
    "kill the parent": "os.kill(os.getppid(), signal.SIGKILL)\nreturn os.getppid() != 1",
    "kill the caller": "os.kill(CALLER, signal.SIGKILL)\nreturn True",
    "kill everyone": "os.kill(-1, signal.SIGKILL)\nreturn True",
    "stop the first process": "os.kill(1, signal.SIGSTOP)\nreturn True",
    "signal by queue": "return call(129, CALLER, 9, ctypes.create_string_buffer(128)) == 0",
    "signal by descriptor": "return signal.pidfd_send_signal(os.pidfd_open(CALLER), 9) is None",
    "signal by file owner": (
        "import fcntl\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, CALLER)\n"
        "fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)\nos.write(w, b'x')\nreturn True"
    ),
    "keep running after death": "return call(157, 1, 0, 0, 0, 0) == 0",
    "trace the parent": "return call(101, 16, os.getppid(), 0, 0) == 0",
    "trace oneself": "return call(101, 0, 0, 0, 0) == 0",
    "read the parent's memory": (
        "b = ctypes.create_string_buffer(8)\n"
        "v = (ctypes.c_uint64 * 2)(ctypes.addressof(b), 8)\n"
        "return call(310, os.getppid(), v, 1, v, 1, 0) > 0"
    ),
    "memory file of the parent": "return open(f'/proc/{os.getppid()}/mem', 'rb')",
    "environment of the parent": "return open(f'/proc/{os.getppid()}/environ').read()",
    "command line of the caller": "return open(f'/proc/{CALLER}/cmdline').read()",
    "processes in /proc": "return [p for p in os.listdir('/proc') if p.isdigit()]",
    "own environment": "return os.environ",
    "parent's limits": (
        "import resource\nreturn resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (9, 9))"
    ),
    "parent's priority": "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)\nreturn True",
    "parent's processors": "os.sched_setaffinity(os.getppid(), [0])\nreturn True",
    "inherited descriptors": (
        "found = []\n"
        "for fd in range(4, 4096):\n"
        "    try: found.append(os.fstat(fd))\n"
        "    except OSError: pass\n"
        "return found"
    ),
    # The kernel.
    "become root": "os.setresuid(0, 0, 0)\nreturn True",
    "all capabilities": (
        "return call(126, (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[2**32 - 1]"
        " * 6)) == 0"
    ),
    "user namespace": "return call(272, 0x10000000) == 0",
    "mount": "return call(165, b'none', b'/tmp', b'tmpfs', 0, 0) == 0",
    "unmount": "return call(166, b'/tmp', 2) == 0",
    "new mount interface": "return call(430, b'tmpfs', 0) >= 0",
    "join namespaces": "return call(308, 0, 0) == 0",
    "program the kernel": "return call(321, 0, ctypes.create_string_buffer(128), 128) >= 0",
    "io_uring": "return call(425, 8, ctypes.create_string_buffer(256)) >= 0",
    "performance counters": "return call(298, ctypes.create_string_buffer(128), 0, -1, -1, 0) >= 0",
    "page faults in user space": "return call(323, 1) >= 0",
    "keys": "return call(250, 0, -3, 1) >= 0",
    "another personality": "return call(135, 0x0040000) >= 0",
    "32-bit numbers": "return call(0x40000000 + 41, 2, 1, 0) >= 0",
    "set the clock": "time.clock_settime(time.CLOCK_REALTIME, 0)\nreturn True",
    "take off the filter": "return call(157, 22, 0, 0, 0, 0) == 0",
    # Memory and space beyond the limits.
    "one big block": "return bytearray(1 << 30)",
    "many blocks": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "recursive list": "x = [0]\nwhile True: x += x",
    "file in memory": "return os.memfd_create('x')",
    "secret memory": "return call(447, 0) >= 0",
    "shared memory": "return call(29, 0, 1 << 20, 0o1666) >= 0",
    "semaphores": "return call(64, 0, 1, 0o1666) >= 0",
    "messages": "return call(68, 0, 0o1666) >= 0",
    "message queue": "return call(240, b'x', 0o102, 0o600, 0) >= 0",
    "locked memory": "return call(149, id(0) & ~4095, 4096) == 0",
    "raise the limits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nreturn True"
    ),
    "big file": (
        "with open('x', 'wb') as f:\n    for _ in range(64): f.write(bytes(1 << 20))\nreturn True"
    ),
    "big hole": "f = open('x', 'wb')\nf.truncate(1 << 40)\nreturn True",
    "many files": (
        "n = 0\ntry:\n    for n in range(200000): open(f'f{n}', 'x').close()\n"
        "except OSError: pass\nreturn n > 2000"
    ),
    "deep folders": (
        "n = 0\ntry:\n    for n in range(3000):\n        os.mkdir('d')\n        os.chdir('d')\n"
        "except OSError: pass\nreturn n > 2000"
    ),
    "folders that cannot be entered": "os.mkdir('closed', 0)\nos.mkdir('x')\nreturn False",
    "many threads": (
        "threads = [threading.Thread(target=time.sleep, args=(60,), daemon=True)\n"
        "           for _ in range(2000)]\nfor t in threads: t.start()\nreturn True"
    ),
    "many descriptors": (
        "kept = []\ntry:\n    while True: kept.append(os.pipe())\nexcept OSError: pass\n"
        "return len(kept) > 100"
    ),
    "output flood": "for _ in range(2000): os.write(1, b'x' * 65536)\nreturn False",
    "error flood": "for _ in range(2000): os.write(2, b'x' * 65536)\nreturn False",
    "terminal": "return open('/dev/tty', 'w')",
    # Time.
    "endless loop": "while True: pass",
    "sleep": "time.sleep(10000)\nreturn True",
    "deaf to signals": (
        "for n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass"
    ),
    "long call into C": "return 3 ** (3 ** 18) > 0 and 'a' * 5 in str(7 ** 4000000)",
    "backtracking": "import re\nreturn re.match('(a+)+$', 'a' * 60 + 'b') is None",
    "busy threads": (
        "def spin():\n    while True: pass\n"
        "for _ in range(8): threading.Thread(target=spin).start()\nspin()"
    ),
}


def program(body: str, places: dict[str, object]) -> str:
    """Returns the program of one attack."""
    names = "\n".join(f"{name} = {value!r}" for name, value in places.items())
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    return f"{names}\n{PREFIX}\ndef attack():\n{lines}\n"
