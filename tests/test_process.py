"""The command as a process of its own: its output, cut short or written to a file."""

import json
import os
import signal
import subprocess
import sys

import pytest

from restem_lightning import __version__


@pytest.mark.parametrize("words", [["report", "--json", "."], ["--help"]])
def test_output_into_a_closed_pipe_ends_in_one_line(words, tmp_path):
    (tmp_path / "iteration_0").mkdir()
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "restem_lightning", *words],
        stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    os.close(writer)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == f"restem {words[0]}: stopped, the reader of its output is gone\n"


def test_a_line_reaches_a_log_file_when_it_is_printed(tmp_path):
    (tmp_path / "iteration_0").mkdir()
    code = (
        "import os\nfrom restem_lightning.cli import main\n"
        f"main(['report', '--json', {str(tmp_path)!r}])\nos._exit(0)"  # as a kill: no flush
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert json.loads(done.stdout)[str(tmp_path)]["iterations"]


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "restem_lightning", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")
