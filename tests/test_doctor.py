"""`restem doctor` tries things out; what it says is what it saw."""

import json
import os

import pytest
import torch
from restem_kernels import c_library

from restem_lightning import doctor
from restem_lightning.doctor import Finding, examine, exit_status, shown


def by_name(findings):
    return {finding.name: finding for finding in findings}


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    return examine(tmp_path_factory.mktemp("doctor") / "runs")


def test_this_machine_passes_its_tests_so_nothing_is_broken(findings):
    assert [one for one in findings if one.state == "broken"] == []


def test_every_check_says_something(findings):
    names = by_name(findings)
    assert {"packages", "device", "kernels", "FSDP", "sandbox", "SLURM", "run folder"} <= set(names)
    assert "torch" in names["packages"].detail
    assert "FSDP2 shards" in names["FSDP"].detail


def test_without_a_compiler_the_kernels_in_c_are_absent(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "/nowhere/cc")
    c_library.load.cache_clear()
    (finding,) = doctor.CHECKS["kernels"](tmp_path)
    c_library.load.cache_clear()
    assert finding.state == ("ok" if torch.cuda.is_available() else "absent")
    assert finding.remedy or finding.state == "ok"


def test_what_is_not_there_comes_with_a_remedy(findings):
    assert all(one.remedy for one in findings if one.state == "absent")


def test_a_check_that_fails_is_a_finding_and_the_others_go_on(monkeypatch, tmp_path):
    def fail(_):
        raise RuntimeError("library gone\nand more")

    monkeypatch.setitem(doctor.CHECKS, "FSDP", fail)
    findings = by_name(examine(tmp_path))
    assert findings["FSDP"].state == "broken"
    assert findings["FSDP"].detail == "library gone"
    assert findings["run folder"].state == "ok"


def test_a_folder_that_takes_no_file_is_broken_and_named(tmp_path):
    (tmp_path / "file").write_text("")
    (finding,) = doctor.CHECKS["run folder"](tmp_path / "file")
    assert finding.state == "broken"
    assert "file" in finding.detail
    assert finding.remedy


def test_the_probe_of_the_folder_leaves_nothing_behind(findings, tmp_path):
    doctor.CHECKS["run folder"](tmp_path)
    assert os.listdir(tmp_path) == []


def test_only_broken_things_make_the_exit_status_1():
    fine = Finding(name="a", state="ok", detail="d")
    absent = Finding(name="b", state="absent", detail="d", remedy="r")
    broken = Finding(name="c", state="broken", detail="d", remedy="mend it")
    assert exit_status([fine, absent]) == 0
    assert exit_status([fine, broken]) == 1
    assert "-> mend it" in shown([fine, broken])


def test_the_verb_prints_json(restem, tmp_path):
    result = restem("doctor", "--folder", str(tmp_path), "--json")
    assert result.code == 0
    assert {"name", "state", "detail", "remedy"} == set(json.loads(result.out)[0])
