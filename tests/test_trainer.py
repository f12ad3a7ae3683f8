"""The Trainer that the command line makes for an M-step."""

import json

import pytest
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger

from restem_lightning.errors import UserError
from restem_lightning.fit import make_cli


@pytest.fixture
def make_trainer(fit_words, tmp_path):
    def make(**changes):
        words = fit_words(tmp_path / "run", **{f"trainer.{k}": v for k, v in changes.items()})
        cli = make_cli(words[1:])
        return cli.make_trainer(cli.build(1), callbacks=[], logger=CSVLogger(tmp_path))

    return make


def test_the_progress_bar_shows_no_number_of_log_folders(make_trainer):
    trainer = make_trainer(enable_progress_bar=True)
    assert "v_num" not in trainer.progress_bar_callback.get_metrics(trainer, None)


def test_a_single_callback_needs_no_list(make_trainer):
    monitor = {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}
    trainer = make_trainer(callbacks=json.dumps(monitor))
    assert any(isinstance(one, LearningRateMonitor) for one in trainer.callbacks)


def test_devices_that_lightning_refuses_are_a_user_error(make_trainer):
    with pytest.raises(UserError, match="devices"):
        make_trainer(devices="two")
