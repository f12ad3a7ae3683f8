"""Pools that runs share: linked where their key is equal, drawn where it is not."""

import fcntl
import shutil
import threading

import pytest

from restem_lightning.completion_store import CompletionStore
from restem_lightning.loop.pool_cache import is_shared, shared_pool
from restem_lightning.run_dir import RunDir, read_json
from tests.factories import make_completion


def fill(folder, cache, key, num_drawn):
    """Fills a pool of two parts and counts the parts that were drawn for it."""
    store = CompletionStore(folder)
    with shared_pool(None if cache is None else str(cache), store, key, num_parts=2):
        done = {part.index for part in store.parts()}
        for index in {0, 1} - done:
            store.write_part(index, [make_completion(problem_id=f"p{index}")])
            num_drawn.append(index)
    return store


def contents(store):
    return {part.path.name: part.path.read_bytes() for part in store.parts()}


def test_a_pool_with_the_same_key_is_linked_and_nothing_is_drawn(tmp_path):
    drawn = []
    first = fill(tmp_path / "a", tmp_path / "cache", {"policy": 1}, drawn)
    assert drawn == [0, 1]
    second = fill(tmp_path / "b", tmp_path / "cache", {"policy": 1}, drawn)
    assert drawn == [0, 1]
    assert contents(second) == contents(first)
    second.verify_checksums()
    assert (is_shared(first), is_shared(second)) == (False, True)
    ours, theirs = (store.parts()[0].path.stat() for store in (first, second))
    assert ours.st_ino == theirs.st_ino  # one copy on the disk


@pytest.mark.parametrize(("key", "cache"), [({"policy": 2}, "cache"), ({"policy": 1}, None)])
def test_another_key_or_no_cache_draws_all(key, cache, tmp_path):
    drawn = []
    fill(tmp_path / "a", tmp_path / "cache", {"policy": 1}, drawn)
    store = fill(tmp_path / "b", cache and tmp_path / cache, key, drawn)
    assert drawn == [0, 1, 0, 1]
    assert not is_shared(store)


def test_what_was_drawn_before_is_never_replaced(tmp_path):
    drawn = []
    fill(tmp_path / "a", tmp_path / "cache", {}, drawn)
    store = CompletionStore(tmp_path / "b")
    own = store.write_part(0, [make_completion()]).path.stat().st_ino
    fill(tmp_path / "b", tmp_path / "cache", {}, drawn)
    assert drawn == [0, 1, 1]
    assert store.parts()[0].path.stat().st_ino == own


def test_an_interrupted_pool_is_not_shared(tmp_path):
    store, drawn = CompletionStore(tmp_path / "a"), []

    def interrupted():
        with shared_pool(str(tmp_path / "cache"), store, {}, num_parts=2):
            store.write_part(0, [make_completion()])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with shared_pool(str(tmp_path / "cache"), store, {}, num_parts=2):
        pass  # asked to stop before it had drawn the rest
    fill(tmp_path / "b", tmp_path / "cache", {}, drawn)
    assert drawn == [0, 1]


def test_deleting_one_run_leaves_the_others_whole(tmp_path):
    fill(tmp_path / "a", tmp_path / "cache", {}, [])
    store = fill(tmp_path / "b", tmp_path / "cache", {}, [])
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "cache")
    store.verify_checksums()
    assert len(store.parts()) == 2


def test_a_pool_that_another_run_draws_is_waited_for_until_its_lock_is_gone(tmp_path):
    drawn = []
    fill(tmp_path / "a", tmp_path / "cache", {}, drawn)
    (pool,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    waiter = threading.Thread(
        target=fill, args=(tmp_path / "b", tmp_path / "cache", {}, drawn), daemon=True
    )
    with open(pool.with_suffix(".lock"), "w") as lock:  # closed by the system if its holder dies
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiter.start()
        waiter.join(0.5)
        assert waiter.is_alive()
        assert not (tmp_path / "b").exists()
    waiter.join(60)
    assert is_shared(CompletionStore(tmp_path / "b"))


def test_a_second_run_draws_only_what_differs(restem, fit_words, tmp_path):
    changes = {
        "e_step.pool_cache": tmp_path / "cache",
        "problems.train.init_args.num": 12,
        "problems.validation": "null",
        "stop.rule": "none",
        "trainer.max_epochs": 1,
    }
    for name, most in (("a", 2), ("b", 1)):
        result = restem(
            *fit_words(tmp_path / name, **changes, **{"selection.max_per_problem": most})
        )
        assert result.code == 0, result.err
    first, second = (RunDir(tmp_path / name).iteration(1) for name in "ab")
    pools = [CompletionStore(paths.completions) for paths in (first, second)]
    assert contents(pools[0]) == contents(pools[1])
    assert [is_shared(pool) for pool in pools] == [False, True]
    e_step = read_json(second.metrics)["e_step"]
    assert (e_step["shared"], e_step["tokens_per_s"], e_step["num_completions"]) == (True, None, 48)
    # Other weights come of another accepted dataset, so their evaluation is drawn.
    for number, shared in ((0, True), (1, False)):
        folder = RunDir(tmp_path / "b").iteration(number).path / "evaluation/held_out/greedy"
        assert is_shared(CompletionStore(folder)) == shared
