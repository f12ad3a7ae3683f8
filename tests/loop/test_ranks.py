"""Two ranks do what one does."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from restem_lightning.completion_store import CompletionStore
from restem_lightning.run_dir import RunDir, read_json
from restem_lightning.settings import EMBEDDED_POLICY
from tests.launch import run_ranks

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)], ids=["data", "tensor"])
def test_two_ranks_accept_the_same_completions_and_train_the_same_policy(
    finished, fit_words, tmp_path, sizes
):
    strategy = {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {"data_parallel_size": sizes[0], "tensor_parallel_size": sizes[1]},
    }
    changes = {"trainer.strategy": json.dumps(strategy), "trainer.devices": 2}
    words = fit_words(tmp_path / "run", **changes)
    done = run_ranks(2, "-m", "restem_lightning", *words, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = finished.iteration(1), RunDir(tmp_path / "run").iteration(1)
    assert two.accepted.read_bytes() == one.accepted.read_bytes()
    columns = ["problem_id", "completion_index", "completion_ids", "logprobs", "verdict"]
    pools = [CompletionStore(paths.completions).read(columns) for paths in (one, two)]
    assert pools[0].to_pylist() == pools[1].to_pylist()
    steps = [read_json(paths.metrics)["m_step"] for paths in (one, two)]
    assert steps[0] == steps[1]
    folders = (EMBEDDED_POLICY, one.policy, two.policy)
    base, first, second = (load_file(folder / "model.safetensors") for folder in folders)
    for name, weights in first.items():
        # Adam divides by the gradient's size, so rounding shows where that is almost 0.
        assert (second[name] - weights).norm() < 1e-3 * (weights - base[name]).norm(), name
    lines = [line for line in done.stdout.splitlines() if line.startswith("iteration")]
    assert len(lines) == 4  # one rank alone reports


def test_a_rank_ten_times_slower_takes_fewer_parts_and_delays_nobody(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import time\n"
        "from datetime import timedelta\n"
        "import torch.distributed as dist\n"
        "from restem_lightning.loop.e_step import claims\n"
        "from restem_lightning.loop.ranks import any_rank, leave_together\n"
        "dist.init_process_group('gloo')\n"
        # Shorter than what the slow rank is behind.
        "dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))\n"
        "rank, taken = dist.get_rank(), []\n"
        "any_rank(False, bool)\n"
        "for part in claims('test', 33):\n"
        "    taken.append(part)\n"
        "    time.sleep((0.05, 0.5)[rank])\n"
        "time.sleep((0.0, 2.0)[rank])\n"
        "assert any_rank(rank == 1, bool) and not any_rank(False, bool)\n"
        f"open(f'{tmp_path}/{{rank}}', 'w').write(' '.join(map(str, taken)))\n"
        "leave_together(bool)\n"
    )
    done = run_ranks(2, worker, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    fast, slow = ((tmp_path / name).read_text().split() for name in "01")
    assert sorted(map(int, fast + slow)) == list(range(33))
    assert len(slow) <= 6  # a fair share would be 16


def test_a_rank_that_waits_hears_that_its_launcher_ends_it(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, signal, time\n"
        "import torch.distributed as dist\n"
        "from restem_lightning.loop import ranks\n"
        "from restem_lightning.loop.stop_request import StopRequest\n"
        "dist.init_process_group('gloo')\n"
        "ranks.LOST_AFTER_S = 0.5\n"
        "stop = StopRequest(reserve_s=0.0)\n"
        "stop.install()\n"
        "stop.is_patient = True\n"
        "ranks.barrier(stop.is_leaving)\n"
        "if dist.get_rank() == 1:\n"
        "    time.sleep(1.0)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "try:\n"
        "    ranks.barrier(stop.is_leaving)\n"
        "except ranks.LostRank as lost:\n"
        f"    open(f'{tmp_path}/lost', 'w').write(str(lost))\n"
    )
    assert run_ranks(2, worker, timeout=120).returncode != 0
    assert (tmp_path / "lost").read_text() == "1 of 2 ranks did not come"
