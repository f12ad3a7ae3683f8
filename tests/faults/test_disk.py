"""A disk that is full or read-only during a write: one line, and the same command goes on."""

import re
from functools import partial

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from restem_lightning.completion_store import CompletionStore
from restem_lightning.fit import run as fit_run
from restem_lightning.loop import callback, iteration
from restem_lightning.m_step import datamodule
from restem_lightning.run_dir import TEMP_SUFFIX
from tests.faults.conftest import SETTINGS, do_before

# What is written -> where the run stands, whose function writes it, at which call, bytes left.
WRITES = {
    "part": ("parts", CompletionStore, "write_part", 2, 4096),
    "accepted dataset": ("accepted", iteration, "write_accepted", 1, 4096),
    "checkpoint": ("m_step", Trainer, "save_checkpoint", 3, 1 << 20),
    "export": ("m_step", callback, "export_policy", 1, 1 << 20),
    "funnel": ("accepted", iteration, "write_json", 1, 0),
    "tokens to train on": ("m_step", datamodule, "write_sequences", 1, 0),
    "log of the M-step": ("m_step", CSVLogger, "save", 1, 0),
    "part of the evaluation": ("m_step", CompletionStore, "write_part", 1, 0),
    "report": ("m_step", fit_run, "write_report", 1, 0),
    "metrics": ("m_step", callback.ReSTEMCallback, "_finish", 1, 0),
}


@pytest.mark.parametrize("written", WRITES)
def test_a_write_that_fails_is_one_line_and_the_same_command_goes_on(
    written, disk, begun, whole, restem, fit_words, outcome, monkeypatch
):
    stage, place, name, call, free_bytes = WRITES[written]
    run = begun(disk.folder, stage)
    words = fit_words(run.path, **SETTINGS)
    for fault, call_now in ((disk.be_full, call), (disk.be_read_only, 1)):
        with monkeypatch.context() as patch:
            do_before(patch, place, name, call_now, partial(fault, free_bytes))
            try:
                stopped = restem(*words)
            finally:
                disk.mend()
        assert stopped.code == 2, stopped.err
        (line,) = stopped.err.splitlines()
        assert line.startswith("restem fit: error: ")
        assert re.search(r" \(\S+\); ", line)  # which file
        assert "same command" in line
        assert run.iteration(1).manifest.exists() == (written == "report")
    resumed = restem(*words)
    assert resumed.code == 0, resumed.err
    assert outcome(run, 1) == outcome(whole, 1)
    assert not list(run.path.rglob(f"*{TEMP_SUFFIX}"))
