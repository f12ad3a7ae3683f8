from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.callbacks import ModelCheckpoint

from restem_lightning.errors import UserError
from restem_lightning.m_step import load_best, resume_checkpoint, stop_callbacks
from restem_lightning.m_step.stopping import best_checkpoint


class GivenReward(pl.Callback):
    """Logs a given val_reward at each check and keeps the weights that had it."""

    def __init__(self, rewards):
        self.rewards = rewards  # by optimizer step
        self.checks = []
        self.weights = {}

    def on_validation_epoch_end(self, trainer, pl_module):
        step = trainer.global_step
        self.checks.append(step)
        self.weights[step] = weights(pl_module)
        pl_module.log("val_reward", self.rewards[step])


class Killed(Exception):
    pass


class Kill(pl.Callback):
    """Kills the M-step in a hook at an optimizer step."""

    def __init__(self, hook, step):
        def die(trainer, pl_module, *args):
            if trainer.global_step == step:
                raise Killed

        setattr(self, hook, die)


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


def best_path(callbacks):
    (best,) = (c for c in callbacks if isinstance(c, ModelCheckpoint) and c.monitor)
    return best.best_model_path


RISES_THEN_DROPS = {1: 0.1, 2: 0.3, 3: 0.2, 4: 0.9, 5: 0.5, 6: 0.5}
SETTINGS = {"max_epochs": 2, "val_check_interval": 1, "check_val_every_n_epoch": None}


@pytest.mark.parametrize(
    ("rule", "patience", "checks", "best"),
    [
        ("first_drop", 1, [1, 2, 3], 2),
        ("first_drop", 2, [1, 2, 3, 4, 5, 6], 4),
        ("best", 1, [1, 2, 3, 4, 5, 6], 4),
    ],
)
def test_rules_stop_when_they_should_and_keep_the_best_weights(
    make_policy, make_accepted, fit, tmp_path, rule, patience, checks, best
):
    callbacks = stop_callbacks(rule, patience=patience, folder=tmp_path / "m")
    reward = GivenReward(RISES_THEN_DROPS)
    module, _, _ = fit(make_policy(), make_accepted(), callbacks=[reward, *callbacks], **SETTINGS)
    assert reward.checks == checks
    assert not same(weights(module), reward.weights[best])
    load_best(module, best_path(callbacks))
    assert same(weights(module), reward.weights[best])
    assert len(list((tmp_path / "m").iterdir())) == 2


def test_rule_none_runs_to_the_end_and_needs_no_reward(make_policy, make_accepted, fit, tmp_path):
    callbacks = stop_callbacks("none", folder=tmp_path / "m")
    _, losses, _ = fit(make_policy(), make_accepted(), callbacks=callbacks, **SETTINGS)
    assert len(losses) == 6
    assert resume_checkpoint(tmp_path / "m").name == "last-6.ckpt"


def test_first_drop_may_be_the_only_end(make_policy, make_accepted, fit, tmp_path):
    module = {"warmup_fraction": 0.0, "schedule": "constant"}
    callbacks = [GivenReward(RISES_THEN_DROPS), *stop_callbacks("first_drop", folder=tmp_path)]
    settings = SETTINGS | {"max_epochs": -1}
    _, losses, _ = fit(
        make_policy(), make_accepted(), module=module, callbacks=callbacks, **settings
    )
    assert len(losses) == 3


@pytest.mark.parametrize(
    ("rule", "hook", "step"),
    [
        ("best", "on_train_batch_end", 1),  # before anything was saved
        ("best", "on_train_batch_end", 3),  # in the first epoch, between checks
        ("first_drop", "on_train_batch_start", 4),  # after the check at the fourth optimizer step
        ("best", "on_train_batch_end", 6),  # at an epoch's last batch, before its check
        ("first_drop", "on_train_batch_start", 6),  # in the second epoch, after that check
        ("best", "on_train_batch_end", 9),
        ("first_drop", "on_train_end", 8),  # after the check that says stop
        ("best", "on_train_end", 10),  # after the last optimizer step and its check
    ],
)
@pytest.mark.parametrize("limit", [{"max_epochs": 2, "limit_train_batches": 5}, {"max_steps": 10}])
def test_a_killed_m_step_ends_like_the_uninterrupted_one(
    make_policy, make_accepted, fit, tmp_path, rule, hook, step, limit
):
    policy, accepted = make_policy(), make_accepted(size=48)  # 6 optimizer steps an epoch
    rewards = {2: 0.1, 4: 0.3, 6: 0.4, 8: 0.2, 10: 0.6, 12: 0.1}
    settings = {"val_check_interval": 2, "check_val_every_n_epoch": None} | limit
    module = {"schedule": "cosine", "warmup_fraction": 0.2}

    def run(name, *extra):
        callbacks = stop_callbacks(rule, folder=tmp_path / name)
        reward = GivenReward(rewards)
        try:
            fitted, losses, _ = fit(
                policy,
                accepted,
                module=module,
                callbacks=[reward, *extra, *callbacks],
                ckpt_path=resume_checkpoint(tmp_path / name),
                **settings,
            )
        except Killed:
            return None
        load_best(fitted, best_path(callbacks))
        return weights(fitted), best_path(callbacks), reward.checks, losses

    whole = run("whole")
    assert run("killed", Kill(hook, step)) is None
    resumed = run("killed")
    assert len(list((tmp_path / "killed").iterdir())) == 2  # nor is what it was resumed from kept
    assert same(whole[0], resumed[0])
    assert whole[1].replace("whole", "killed") == resumed[1]
    assert whole[2][len(whole[2]) - len(resumed[2]) :] == resumed[2]
    assert whole[3][len(whole[3]) - len(resumed[3]) :] == resumed[3]


def test_a_kill_between_best_and_last_loses_no_best_weights(
    make_policy, make_accepted, fit, monkeypatch, tmp_path
):
    policy, accepted, folder = make_policy(), make_accepted(size=24), tmp_path / "m"
    save = pl.Trainer.save_checkpoint

    def die_at_last_2(trainer, path, *args):
        if Path(path).name == "last-2.ckpt":
            raise Killed
        save(trainer, path, *args)

    def run(rewards):
        callbacks = [GivenReward(rewards), *stop_callbacks("best", folder=folder)]
        resume = resume_checkpoint(folder)
        settings = SETTINGS | {"max_epochs": 1}
        fit(policy, accepted, callbacks=callbacks, ckpt_path=resume, **settings)
        return best_path(callbacks)

    with monkeypatch.context() as patch:
        patch.setattr(pl.Trainer, "save_checkpoint", die_at_last_2)
        with pytest.raises(Killed):
            run({1: 0.2, 2: 0.3})
    assert sorted(path.name for path in folder.iterdir()) == [
        "best-1.ckpt", "best-2.ckpt", "last-1.ckpt",
    ]  # fmt: skip
    # As on a GPU the second look at the same step sees another reward.
    assert Path(run({2: 0.1, 3: 0.0})).name == "best-1.ckpt"
    assert sorted(path.name for path in folder.iterdir()) == ["best-1.ckpt", "last-3.ckpt"]


def test_the_best_weights_are_never_those_of_a_users_own_checkpoints(tmp_path):
    theirs = ModelCheckpoint(dirpath=tmp_path, monitor="train_loss")
    for rule in ("best", "none"):
        ours = stop_callbacks(rule, folder=tmp_path)
        trainer = pl.Trainer(callbacks=[theirs, *ours], logger=False, accelerator="cpu")
        assert best_checkpoint(trainer) is (ours[0] if rule == "best" else None)


def test_resume_takes_the_newest_complete_checkpoint(tmp_path):
    assert resume_checkpoint(tmp_path) is None
    (tmp_path / "last-9.ckpt").touch()
    dcp.save({"weights": torch.ones(9)}, checkpoint_id=tmp_path / "last-10.ckpt", no_dist=True)
    torch.save({}, tmp_path / "last-10.ckpt" / "meta.pt")
    (tmp_path / "last-11.ckpt").mkdir()  # killed while ranks wrote their shards
    (tmp_path / "best-12.ckpt").touch()
    assert resume_checkpoint(tmp_path).name == "last-10.ckpt"


def test_unknown_rule_and_patience_are_refused(tmp_path):
    with pytest.raises(UserError, match="first_drop, best or none"):
        stop_callbacks("first_rise", folder=tmp_path)
    with pytest.raises(UserError, match="patience"):
        stop_callbacks("best", patience=0, folder=tmp_path)
