"""What the probes try from inside, and must not achieve; run in the sandbox as a script.

The first line of standard input is a JSON object with the places to try. Standard output gets one
JSON object: for each attempt whether it succeeded.
"""

import contextlib
import json
import os
import socket
import sys


def read_file(places):
    """Reads the caller's file."""
    with open(places["file"]) as file:
        return bool(file.read())


def write_file(places):
    """Writes into the caller's file, or makes a new one beside it."""
    for path in (places["file"], places["file"] + ".new"):
        with contextlib.suppress(OSError), open(path, "w") as file:
            file.write("x")
            return True
    return False


def change_mode(places):
    """Changes the mode of the caller's file."""
    os.chmod(places["file"], 0o600)
    return True


def connect_tcp(places):
    """Connects to the caller's port."""
    socket.socket().connect((b"127.0.0.1", places["port"]))
    return True


def connect_unix(places):
    """Connects to the caller's socket file."""
    socket.socket(socket.AF_UNIX).connect(places["socket"])
    return True


def send_datagram(places):
    """Sends a datagram."""
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", (b"127.0.0.1", places["port"]))
    return True


def signal_caller(places):
    """Finds the caller's process by a signal that does nothing."""
    os.kill(places["pid"], 0)
    return True


def see_caller(places):
    """Reads the caller's environment."""
    with open(f"/proc/{places['pid']}/environ", "rb") as file:
        file.read()
    return True


def fork(places):
    """Makes another process."""
    if os.fork() == 0:
        os._exit(0)
    return True


def execute(places):
    """Becomes another program."""
    if os.access(places["python"], os.X_OK):
        os.execv(places["python"], [places["python"], "-c", "print('{\"execute\": true}')"])
    os.execv("/bin/true", ["/bin/true"])
    return True


def take_memory(places):
    """Allocates more than the limit."""
    return len(bytearray(places["memory_bytes"])) > 0


def make_memory_file(places):
    """Makes a file in memory."""
    return os.memfd_create("x") >= 0


def fill_directory(places):
    """Writes more than the private directory's limit."""
    total = 0
    with contextlib.suppress(OSError):
        for index in range(8):
            with open(f"fill{index}", "wb") as file:
                total += file.write(bytes(places["private_bytes"] // 4))
    return total > places["private_bytes"]


def main():
    """Tries everything."""
    places, results = json.loads(sys.stdin.readline()), {}
    attempts = (
        read_file, write_file, change_mode, connect_tcp, connect_unix, send_datagram,
        signal_caller, see_caller, fork, execute, take_memory, make_memory_file, fill_directory,
    )  # fmt: skip
    for attempt in attempts:
        try:
            results[attempt.__name__] = attempt(places)
        except (OSError, MemoryError):
            results[attempt.__name__] = False
    print(json.dumps(results))


main()
