import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
USERS = ("root", "nobody") if os.geteuid() == 0 else ("myself",)
LEVELS = ("namespaces", "landlock")


def command(level, user):
    words = [sys.executable, str(FOLDER / "attack_run.py"), level]
    return [sys.executable, str(FOLDER / "ordinary_user.py"), *words] if user == "nobody" else words


@pytest.fixture(scope="module")
def runs():
    """All runs at once: most of their time is spent in waiting for limits."""
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parents[1])}
    started = {
        (level, user): subprocess.Popen(
            command(level, user), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )
        for level in LEVELS
        for user in USERS
    }
    return {key: (*process.communicate(), process.returncode) for key, process in started.items()}


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("level", LEVELS)
def test_no_cheat_passes_and_no_attack_gets_out(runs, level, user):
    out, err, status = runs[level, user]
    assert status == 0, err.decode()
    result = json.loads(out)
    assert result["breaches"] == []
    assert result["num_programs"] >= 180
    assert (result["user"] == 0) == (user == "root")
