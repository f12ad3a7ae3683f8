import json
import re
from html.parser import HTMLParser

import pytest

from restem_lightning.errors import UserError
from restem_lightning.report import collect_metrics, iteration_table, write_report
from restem_lightning.run_dir import RunDir, write_json


def estimate(value: float) -> dict:
    return {"value": value, "low": value - 0.05, "high": value + 0.05, "num_problems": 256}


def metrics(iteration: int, value: float) -> dict:
    evaluation = {
        "greedy_pass@1": estimate(value),
        "pass@1": estimate(value - 0.02),
        "pass@4": estimate(value + 0.1),
        "pass@16": estimate(value + 0.2),
        "maj@16": estimate(value + 0.05),
    }
    record = {"iteration": iteration, "evaluation": {"held_out": evaluation}}
    if iteration:
        record["e_step"] = {
            "num_solved": 90,
            "num_accepted": 1234,
            "num_tokens": 500_000,
            "tokens_per_s": 4321.0,
        }
    return record | {"seconds": {"e_step": 100.0, "m_step": 60.5}}


def funnel() -> dict:
    return {
        "completions": 3200,
        "not_truncated": 3100,
        "correct": 1500,
        "distinct": 1400,
        "accepted": 1234,
        "num_problems": 100,
        "num_solved": 90,
        "acceptance_rate": 1234 / 3200,
        "verdicts": {"CORRECT": 1500, "WRONG": 1700},
    }


def make_run(path) -> RunDir:
    """A run with the base model, one finished iteration and a second one after its E-step."""
    run = RunDir(path)
    write_json(run.iteration(0).metrics, metrics(0, 0.4))
    write_json(run.iteration(1).metrics, metrics(1, 0.55))
    write_json(run.iteration(1).manifest, {})
    for iteration in (1, 2):
        write_json(run.iteration(iteration).funnel, funnel())
    return run


class Balance(HTMLParser):
    """Fails on a tag that is not closed, and keeps the tags seen."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_one_well_formed_file_without_outside_resources(tmp_path):
    make_run(tmp_path / "a")
    page = write_report([tmp_path / "a"], tmp_path / "report.html").read_text()
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert not {"script", "link", "img", "iframe"} & set(parser.seen)
    assert not re.search(r"https?:|@import|url\(", page)


def test_the_report_charts_each_metric_with_a_point_per_evaluated_iteration(tmp_path):
    make_run(tmp_path / "a")
    page = write_report([tmp_path / "a"], tmp_path / "report.html").read_text()
    assert page.count("<svg") == 5
    assert page.count("<circle") == 10
    assert "iteration 1: 55.0 [50.0, 60.0]" in page
    for text in ("3,200", "1,234", "38.6 %", "90 / 100", "4,321", "2 (unfinished)"):
        assert text in page


def test_the_report_says_what_the_quota_spared_and_whether_sampler_and_trainer_agree(tmp_path):
    run = make_run(tmp_path / "a")
    measured = {"num_tokens": 5000, "mean_abs_dlogp": 2e-3, "mean_abs_dp": 1e-3, "kl": None}
    for iteration, within in ((1, True), (2, False)):
        record = metrics(iteration, 0.5)
        record["e_step"]["parity"] = {**measured, "max_abs_dlogp": 0.25, "within_bounds": within}
        write_json(run.iteration(iteration).metrics, record)
    page = write_report([run.path], tmp_path / "report.html").read_text()
    assert "not drawn" not in page.lower()
    for text in ("5,000", "2.5e-01", "2.0e-03", "not finite", "yes", "NO: do not trust this run"):
        assert f"<td>{text}</td>" in page
    write_json(run.iteration(1).funnel, funnel() | {"num_skipped": 1600})
    page = write_report([run.path], tmp_path / "report.html").read_text()
    assert "<td>3,200 (1,600 not drawn)</td>" in page
    assert "Not drawn: " in page
    parser = Balance()
    parser.feed(page)
    assert parser.open == []


def test_the_report_shows_how_to_draw_a_completion_again(tmp_path):
    run = make_run(tmp_path / "a")
    page = write_report([run.path], tmp_path / "report.html").read_text()
    assert f"restem sample --replay {run.path}/iteration_1/completions:PROBLEM_ID" in page


def test_chart_points_are_where_their_values_are(tmp_path):
    run = make_run(tmp_path / "a")
    for iteration, value in ((0, 0.05), (1, 0.95)):
        record = {"evaluation": {"held_out": {"greedy_pass@1": estimate(value)}}}
        write_json(run.iteration(iteration).metrics, record)
    page = write_report([run.path], tmp_path / "report.html").read_text()
    circles = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', page)
    ticks = re.findall(r'<text x="\d+" y="([\d.]+)" dy="4" text-anchor="end">(\d+)<', page)
    y_of = {int(percent): float(y) for y, percent in ticks}
    (x0, y0), (x1, y1) = (tuple(map(float, circle)) for circle in circles)
    assert x0 < x1
    # 0 % is at the bottom and 100 % at the top.
    assert y0 == pytest.approx(y_of[0] + 0.05 * (y_of[100] - y_of[0]), abs=0.2)
    assert y1 == pytest.approx(y_of[0] + 0.95 * (y_of[100] - y_of[0]), abs=0.2)


def test_several_runs_share_the_charts(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    page = write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "report.html").read_text()
    assert page.count("<svg") == 5
    assert page.count("<circle") == 20


def test_names_are_escaped(tmp_path):
    run = make_run(tmp_path / "a")
    record = {"evaluation": {"<b>set</b>": {"pass@1": estimate(0.5)}}}
    write_json(run.iteration(0).metrics, record)
    page = write_report([run.path], tmp_path / "report.html").read_text()
    assert "<b>set" not in page
    assert "&lt;b&gt;set" in page


def test_a_run_without_metrics_still_has_a_report(tmp_path):
    write_json(tmp_path / "a" / "run.json", {})
    page = write_report([tmp_path / "a"], tmp_path / "report.html").read_text()
    assert "No iteration has been evaluated yet" in page


def test_collected_metrics_hold_the_files_and_what_is_missing(tmp_path):
    run = make_run(tmp_path / "a")
    collected = collect_metrics([run.path])
    iterations = collected[str(run.path)]["iterations"]
    assert [(entry["iteration"], entry["finished"]) for entry in iterations] == [
        (0, False),
        (1, True),
        (2, False),
    ]
    assert iterations[1]["metrics"] == metrics(1, 0.55)
    assert iterations[2] == {
        "iteration": 2,
        "finished": False,
        "metrics": None,
        "funnel": funnel(),
    }
    assert json.loads(json.dumps(collected)) == collected


def test_a_folder_that_is_not_there_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        collect_metrics([tmp_path / "none"])


def test_the_iteration_table_shows_rates_counts_and_seconds(tmp_path):
    lines = iteration_table(make_run(tmp_path / "a").path).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines]
    assert cells[0] == [
        "iteration",
        "greedy pass@1",
        "pass@1",
        "pass@16",
        "maj@16",
        "solved",
        "accepted",
        "seconds",
    ]
    assert cells[2] == [
        "1",
        "55.0 [50.0, 60.0]",
        "53.0 [48.0, 58.0]",
        "75.0 [70.0, 80.0]",
        "60.0 [55.0, 65.0]",
        "90",
        "1,234",
        "160",
    ]
    assert cells[3] == ["2", "-", "-", "-", "-", "-", "-", "-"]


def test_the_iteration_table_has_a_row_per_set_if_there_are_several(tmp_path):
    run = make_run(tmp_path / "a")
    record = metrics(1, 0.55)
    record["evaluation"]["train"] = {"pass@1": estimate(0.7)}
    write_json(run.iteration(1).metrics, record)
    table = iteration_table(run.path)
    assert "set" in table.splitlines()[0].split()
    assert re.search(r"1 +train +- +70\.0 \[65\.0, 75\.0\] +- +-", table)


@pytest.mark.parametrize("content", ["[1]", '{"iteration": 0, "eval'])
def test_metrics_that_no_run_has_written_are_a_user_error(content, tmp_path):
    run = make_run(tmp_path / "run")
    run.iteration(1).metrics.write_text(content)
    with pytest.raises(UserError, match=r"iteration_1/metrics.json must"):
        iteration_table(run.path)


def test_rates_of_another_kind_are_left_out(tmp_path):
    run = make_run(tmp_path / "run")
    evaluation = {"pass@all": estimate(0.5), "pass@1": estimate(0.5)}
    write_json(run.iteration(1).metrics, {"evaluation": {"held_out": evaluation}})
    assert "pass@all" not in write_report([run.path], tmp_path / "r.html").read_text()
