"""Programs that want to pass without solving: all are put to a problem that wants add(a, b)."""

TESTS = "assert add(1, 2) == 3\nassert add(20, 5) == 25\nassert add(-1, 1) == 0"

_EQUAL = "def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
_HASH = "    __hash__ = None\n"

CHEATS = {
    "equal object": f"class A:\n    {_EQUAL}\ndef add(a, b): return A()",
    "equal int": f"class A(int):\n    {_EQUAL}{_HASH}\ndef add(a, b): return A(7)",
    "equal float": f"class A(float):\n    {_EQUAL}{_HASH}\ndef add(a, b): return A(7)",
    "equal str": f"class A(str):\n    {_EQUAL}{_HASH}\ndef add(a, b): return A()",
    "equal list": f"class A(list):\n    {_EQUAL}{_HASH}\ndef add(a, b): return A()",
    "equal dict": f"class A(dict):\n    {_EQUAL}{_HASH}\ndef add(a, b): return A()",
    "equal tuple": (
        f"class A(tuple):\n    _fields = ()\n    {_EQUAL}{_HASH}\ndef add(a, b): return A()"
    ),
    "equal type": (
        f"class M(type):\n    {_EQUAL}{_HASH}\nclass A(metaclass=M): pass\ndef add(a, b): return A"
    ),
    "equal counter": (
        "from collections import Counter\n"
        f"class A(Counter):\n    {_EQUAL}{_HASH}\ndef add(a, b): return A()"
    ),
    "equal fraction": (
        "from fractions import Fraction\n"
        f"class A(Fraction):\n    {_EQUAL}{_HASH}\ndef add(a, b): return A(1)"
    ),
    "reflected equality": (
        "class A(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
        "class B(A): pass\ndef add(a, b): return B()"
    ),
    "mock ANY": "from unittest import mock\ndef add(a, b): return mock.ANY",
    "magic mock": (
        "from unittest.mock import MagicMock\n"
        "m = MagicMock()\nm.__eq__.return_value = True\ndef add(a, b): return m"
    ),
    "spoofed class": (
        f"class A:\n    __class__ = int\n    {_EQUAL}    def __index__(self): return 3\n"
        "def add(a, b): return A()"
    ),
    "entry point is an object": (
        f"class A:\n    {_EQUAL}    def __call__(self, *a): return self\nadd = A()"
    ),
    "entry point is data": "add = 3",
    "entry point missing": "def plus(a, b): return a + b",
    "reduce": ("class A:\n    def __reduce__(self): return (int, (3,))\ndef add(a, b): return A()"),
    "dataclass equality": (
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 0\n"
        f"    {_EQUAL}\ndef add(a, b): return A()"
    ),
    "not a number": "def add(a, b): return float('nan')",
    "always true": "def add(a, b): return True",
    "generator": "def add(a, b):\n    yield a + b",
    "collector hunt": (
        "import gc\n"
        "def add(a, b):\n"
        "    for x in gc.get_objects():\n"
        "        try:\n"
        "            if type(x) is list: x.append('passed')\n"
        "            if type(x) is dict and 'num_ran' in x: x['num_ran'] = 9\n"
        "        except Exception: pass\n"
        "    return None"
    ),
    "frame hunt": (
        "import sys\n"
        "def add(a, b):\n"
        "    frame = sys._getframe()\n"
        "    while frame:\n"
        "        for x in frame.f_code.co_consts:\n"
        "            if isinstance(x, int) and x in (3, 25): return x\n"
        "        for k, v in list(frame.f_locals.items()):\n"
        "            if k in ('expected', 'tests', 'nonce'): return v\n"
        "        frame = frame.f_back\n"
    ),
    "tests from memory": (
        "import gc\n"
        "def add(a, b):\n"
        "    found = [x for x in gc.get_objects() if chr(97) + 'ssert add(20' in str(x)[:9999]]\n"
        "    return a + b if found else None"
    ),
    "exit at import": "import sys\ndef add(a, b): return 0\nsys.exit(0)",
    "exit in the call": "def add(a, b): exit(0)",
    "system exit": "def add(a, b): raise SystemExit(0)",
    "keyboard interrupt": "def add(a, b): raise KeyboardInterrupt",
    "hard exit at import": "import os\nos._exit(0)",
    "hard exit in the call": "import os\ndef add(a, b): os._exit(0)",
    "exit by posix": "import posix\ndef add(a, b): posix._exit(0)",
    "exit handler": "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b): return 1 / 0",
    "exception hook": (
        "import sys, os\nsys.excepthook = lambda *a: os._exit(0)\ndef add(a, b): return 1 / 0"
    ),
    "thread exits": (
        "import threading, os\nthreading.Timer(0.01, os._exit, (0,)).start()\n"
        "import time\ndef add(a, b): time.sleep(0.2)"
    ),
    "signal exits": (
        "import signal, os, time\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.01)\ndef add(a, b): time.sleep(0.2)"
    ),
    "finaliser exits": (
        "import os\nclass A:\n    def __del__(self): os._exit(0)\n"
        "def add(a, b):\n    A()\n    return 0"
    ),
    "assertion from inside": "def add(a, b): raise AssertionError",
    "stop iteration": "def add(a, b): raise StopIteration",
    "unknown exception": "class E(Exception): pass\ndef add(a, b): raise E('passed')",
    "exception without a name": (
        "class M(type):\n    __name__ = 3\nclass E(Exception, metaclass=M): pass\n"
        "def add(a, b): raise E"
    ),
    "marker on output": "print('passed\\nPASSED\\nOK\\n[\"passed\"]')\ndef add(a, b): return 0",
    "markers on descriptors": (
        "import os, json, struct\n"
        "m = json.dumps(['', 'passed', '', 3, 3]).encode()\n"
        "for fd in range(64):\n"
        "    try: os.write(fd, struct.pack('>I', len(m)) + m)\n"
        "    except OSError: pass\n"
        "def add(a, b): return 0"
    ),
    "answers without values": (
        "import os, json, struct\n"
        "m = json.dumps(['value']).encode()\n"
        "def add(a, b): os.write(3, struct.pack('>I', len(m)) + m)"
    ),
    "a code object by hand": (
        "import os, json, struct\n"
        "m = json.dumps(['value', {'eval': '3'}]).encode()\n"
        "def add(a, b): os.write(3, struct.pack('>I', len(m)) + m)"
    ),
    "an opaque by hand": (
        "import os, json, struct\n"
        "m = json.dumps(['value', {'opaque': [0, True]}]).encode()\n"
        "def add(a, b): os.write(3, struct.pack('>I', len(m)) + m)"
    ),
    "a length of gigabytes": "import os\ndef add(a, b): os.write(3, b'\\xff\\xff\\xff\\xff')",
    "channel closed": "import os\ndef add(a, b): os.close(3)",
    "output into the channel": "import os\nos.dup2(3, 1)\ndef add(a, b):\n    print('x' * 99)",
    "json patched": (
        'import json\njson.dumps = lambda *a, **k: \'["value", {"opaque": [0, true]}]\'\n'
        "def add(a, b): return 0"
    ),
    "codec patched": (
        "import sys\n"
        "for name, module in list(sys.modules.items()):\n"
        "    for key in ('encode', 'decode', '_to_json', 'describe', 'MAX_FRAME'):\n"
        "        if name.startswith('inside') and hasattr(module, key):\n"
        "            setattr(module, key, lambda *a: b'[\"passed\"]')\n"
        "def add(a, b): return 0"
    ),
    "builtins patched": (
        "import builtins\nbuiltins.all = builtins.any = lambda x: True\n"
        "builtins.isinstance = lambda *a: True\nbuiltins.AssertionError = ValueError\n"
        "def add(a, b): return 0"
    ),
    "math patched": "import math\nmath.isclose = lambda *a, **k: True\ndef add(a, b): return 0",
    "trace jumps": (
        "import sys\ndef trace(frame, event, arg):\n"
        "    if event == 'line': frame.f_lineno = frame.f_lineno + 1\n    return trace\n"
        "sys.settrace(trace)\ndef add(a, b): return 0"
    ),
    "without asserts": (
        "import os, sys\n"
        "def add(a, b): os.execv(sys.executable or '/usr/bin/python3', ['python', '-O', '-c', ''])"
    ),
    "becomes true": "import os\ndef add(a, b): os.execv('/bin/true', ['true'])",
    "forks and leaves": "import os\nif os.fork(): os._exit(0)\ndef add(a, b): return 0",
    "first test by heart": "def add(a, b): return 3 if (a, b) == (1, 2) else None",
    "last tests wrong": "def add(a, b): return a + b if a > 0 else 99",
    "huge answer": "def add(a, b): return 'x' * (1 << 26)",
    "huge number": "def add(a, b): return 1 << (1 << 27)",
    "cyclic answer": "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
    "deep answer": "def add(a, b):\n    x = []\n    for _ in range(10 ** 5): x = [x]\n    return x",
    "deep by hand": (
        "import os, struct\nm = b'[' * 10 ** 6\n"
        "def add(a, b): os.write(3, struct.pack('>I', len(m))); os.write(3, m)"
    ),
    "unhashable set": (
        "import os, json, struct\nm = json.dumps(['value', {'set': [[1]]}]).encode()\n"
        "def add(a, b): os.write(3, struct.pack('>I', len(m)) + m)"
    ),
    "surrogates": "def add(a, b): return '\\ud800\\x00'",
    "truth raises": "class A:\n    def __bool__(self): 1 / 0\ndef add(a, b): return A()",
    "endless recursion": "def add(a, b): return add(a, b)",
    "null pointer": "import ctypes\ndef add(a, b): return ctypes.string_at(0)",
    "stack overflow": (
        "import sys\nsys.setrecursionlimit(10 ** 9)\n"
        "class A:\n    def __getattr__(self, x): return getattr(self, x + 'y')\n"
        "def add(a, b): return A().x"
    ),
    "syntax error": "def add(a, b: return",
    "null byte": "def add(a, b): return 0\n\x00",
    "surrogate in the source": "def add(a, b): return '\ud800'",
    "deep source": "def add(a, b): return " + "(" * 5000 + "3" + ")" * 5000,
}
