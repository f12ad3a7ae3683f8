import json

import pyarrow.parquet as pq
import pytest

from restem_lightning.completion_store import CompletionStore
from restem_lightning.completions import (
    SCHEMA,
    Completion,
    Verdict,
    VerdictKind,
    from_table,
    to_table,
)
from restem_lightning.errors import UserError
from restem_lightning.run_dir import TEMP_SUFFIX


def completion(problem_id="p0", index=0, kind=VerdictKind.CORRECT, text="3+4=7") -> Completion:
    return Completion(
        iteration=1,
        problem_id=problem_id,
        completion_index=index,
        seed=5,
        prompt_ids=[1, 2, 3],
        completion_ids=[4, 5],
        text=text,
        logprobs=[-0.5, -0.25],
        sampling_logprobs=[-0.125, 0.0],
        finish_reason="eos",
        policy_hash="abc",
        sampling='{"temperature": 0.7}',
        verdict=Verdict(kind=kind, extracted="7", detail="equal", elapsed_s=0.5),
        verifier="math/1",
    )


def two_parts(folder) -> CompletionStore:
    store = CompletionStore(folder)
    store.write_part(10, [completion("c", kind=VerdictKind.WRONG)])
    store.write_part(2, [completion("b", 0), completion("b", 1), completion("a", 0)])
    return store


def flip_byte(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_completions_survive_the_table():
    originals = [completion(kind=kind, index=i) for i, kind in enumerate(VerdictKind)]
    assert from_table(to_table(originals)) == originals


def test_a_reward_of_the_verifier_s_own_survives_the_table():
    verdicts = [Verdict(kind=VerdictKind.WRONG, reward=0.8), Verdict(kind=VerdictKind.CORRECT)]
    originals = [completion(index=i).with_verdict(verdict) for i, verdict in enumerate(verdicts)]
    assert [one.verdict for one in from_table(to_table(originals))] == verdicts


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_refused(reward):
    with pytest.raises(ValueError, match="must be finite"):
        Verdict(kind=VerdictKind.CORRECT, reward=reward)


def test_without_one_of_its_own_only_correct_has_a_reward():
    table = to_table([completion(kind=kind) for kind in VerdictKind])
    rewards = dict(zip(table["verdict"].to_pylist(), table["reward"].to_pylist(), strict=True))
    assert rewards == {
        "CORRECT": 1.0,
        "WRONG": 0.0,
        "NO_ANSWER": 0.0,
        "TIMEOUT": 0.0,
        "ERROR": 0.0,
    }


def test_parts_are_read_in_order_of_their_index(tmp_path):
    store = two_parts(tmp_path)
    table = store.read()
    assert table.schema.equals(SCHEMA, check_metadata=True)
    assert table["problem_id"].to_pylist() == ["b", "b", "a", "c"]
    assert table["verdict"].to_pylist() == ["CORRECT"] * 3 + ["WRONG"]
    assert from_table(table)[1] == completion("b", 1)


def test_chosen_columns_come_in_the_order_asked_for(tmp_path):
    table = two_parts(tmp_path).read(["verdict", "problem_id"])
    assert table.column_names == ["verdict", "problem_id"]


def test_the_file_tells_its_schema_version(tmp_path):
    part = CompletionStore(tmp_path).write_part(0, [completion()])
    assert pq.read_schema(part.path).metadata[b"schema_version"] == b"3"


def test_another_schema_version_is_refused(tmp_path):
    store = CompletionStore(tmp_path)
    part = store.write_part(0, [completion()])
    table = pq.read_table(part.path).replace_schema_metadata({"schema_version": "99"})
    pq.write_table(table, part.path)
    with pytest.raises(UserError, match="schema version 99"):
        store.read()


def test_finished_problems_are_those_of_all_parts(tmp_path):
    store = two_parts(tmp_path)
    assert store.finished_problem_ids() == {"a", "b", "c"}
    assert [(part.index, part.num_rows) for part in store.parts()] == [(2, 3), (10, 1)]


def test_an_empty_pool_reads_as_an_empty_table(tmp_path):
    store = CompletionStore(tmp_path / "none")
    assert store.finished_problem_ids() == set()
    assert store.read().num_rows == 0


def test_a_part_whose_writer_was_killed_before_the_index_entry_is_not_there(tmp_path):
    store = two_parts(tmp_path)
    (tmp_path / "part-00002.json").unlink()
    (tmp_path / f".part-00003.parquet.0a{TEMP_SUFFIX}").write_bytes(b"half a file")
    assert store.finished_problem_ids() == {"c"}
    assert store.read(["problem_id"]).num_rows == 1
    store.write_part(2, [completion("b")])
    assert store.finished_problem_ids() == {"b", "c"}


def test_a_flipped_byte_is_found_and_the_part_can_be_redrawn(tmp_path):
    store = two_parts(tmp_path)
    store.verify_checksums()
    flip_byte(tmp_path / "part-00010.parquet")
    with pytest.raises(UserError, match=r"part-00010\.parquet.*sha256.*delete it"):
        store.verify_checksums()
    store.delete_part(10)
    store.verify_checksums()
    assert store.finished_problem_ids() == {"a", "b"}
    assert not (tmp_path / "part-00010.parquet").exists()


@pytest.mark.parametrize("damage", ["cut", "missing", "fewer rows"])
def test_reading_a_damaged_part_names_the_file_and_the_remedy(tmp_path, damage):
    store = two_parts(tmp_path)
    path = tmp_path / "part-00002.parquet"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "missing":
        path.unlink()
    else:
        pq.write_table(to_table([completion("b")]), path)
    with pytest.raises(UserError, match=r"part-00002\.parquet.*part-00002\.json.*redrawn"):
        store.read()


def test_a_problem_in_two_parts_is_refused(tmp_path):
    store = two_parts(tmp_path)
    store.write_part(11, [completion("b")])
    with pytest.raises(UserError, match=r"'b'.*part-00002\.parquet, part-00011\.parquet"):
        store.parts()


def test_the_pool_is_bound_to_its_settings(tmp_path):
    store = CompletionStore(tmp_path / "pool")
    store.check_key({"policy_hash": "abc", "sampling": {"n": 4}})
    CompletionStore(tmp_path / "pool").check_key({"sampling": {"n": 4}, "policy_hash": "abc"})
    with pytest.raises(UserError, match=r"sampling\.n was 4, now 8"):
        store.check_key({"policy_hash": "abc", "sampling": {"n": 8}})
    assert set(json.loads((tmp_path / "pool" / "pool.json").read_text())) == {"settings", "hash"}
