"""Metrics of runs as one HTML file, as one mapping, or as a plain-text table."""

import math
import os
from collections.abc import Sequence
from html import escape
from itertools import chain
from pathlib import Path
from typing import Any

from restem_lightning.errors import UserError
from restem_lightning.run_dir import RunDir, atomic_path, read_json

_STAGES = ("completions", "not_truncated", "correct", "distinct", "accepted")
_PARITY = {
    "max_abs_dlogp": "max |dlogp|",
    "mean_abs_dlogp": "mean |dlogp|",
    "mean_abs_dp": "mean |dp|",
    "kl": "KL",
}
# Okabe and Ito's palette: told apart with any kind of colour vision.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_WIDTH, _HEIGHT = 380, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 40
_CSS = """
body{font:15px/1.45 system-ui,sans-serif;color:#222;max-width:1220px;margin:2em auto;padding:0 1em}
h1{font-size:1.5em}h2{font-size:1.2em;margin-top:2em}h3{font-size:1em}
figure{display:inline-block;margin:0 1em 1em 0}figcaption{font-weight:600}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
table{font-size:.88em;margin:.5em 0 1.5em}
th,td{padding:.25em .7em;text-align:right;border-bottom:1px solid #ddd}
th:first-child,td:first-child{text-align:left}
.swatch{display:inline-block;width:1em;height:.7em;margin:0 .4em 0 1em}.note{color:#666}
"""


def collect_metrics(run_dirs: Sequence[str | os.PathLike[str]]) -> dict[str, Any]:
    """Returns all that is known of some runs, finished or not.

    Args:
        run_dirs: run folders.

    Returns:
        {run folder: {"iterations": [{"iteration", "finished", "metrics", "funnel"}, ...]}}, where
        metrics and funnel are the content of the files, None where there is none yet.

    Raises:
        UserError: a folder is not that of a run, or one of its files is not JSON.
    """
    return {str(path): {"iterations": _iterations(RunDir(path))} for path in run_dirs}


def iteration_table(run_dir: str | os.PathLike[str]) -> str:
    """Returns the plain-text table of a run's iterations, printed when the run ends.

    Rates are in percent with their 95 % interval in brackets; seconds cover the whole iteration.
    A column named "set" is added if there are several evaluation sets.

    Raises:
        UserError: as `collect_metrics`.
    """
    iterations = _iterations(RunDir(run_dir))
    sets = _evaluation_sets(iterations)
    names = list(dict.fromkeys(chain.from_iterable(_metric_names(iterations, one) for one in sets)))
    shown = [name for name in ("greedy_pass@1", "pass@1") if name in names]
    for prefix in ("pass@", "maj@", "best@"):
        largest = max((name for name in names if name.startswith(prefix)), key=_k, default="pass@1")
        shown += [largest] if largest != "pass@1" else []
    rows = [["iteration", *(["set"] if len(sets) > 1 else []), *(_label(name) for name in shown)]]
    rows[0] += ["solved", "accepted", "seconds"]
    for entry in iterations:
        for one in sets or [""]:
            evaluation = _evaluation(entry, one)
            row = [str(entry["iteration"]), *([one] if len(sets) > 1 else [])]
            row += [_rate(evaluation.get(name)) for name in shown]
            e_step = (entry["metrics"] or {}).get("e_step") or {}
            row += [_count(e_step.get("num_solved")), _count(e_step.get("num_accepted"))]
            rows.append([*row, _number(_total_s(entry))])
    return _align(rows)


def write_report(
    run_dirs: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]
) -> Path:
    """Writes one self-contained HTML file about some runs and returns its path.

    It shows, for each evaluation set, every metric over iterations with its 95 % interval, one line
    per run, and for each run the tables behind it. It needs no network and no script.

    Args:
        run_dirs: run folders; unfinished iterations are shown as far as they have come.
        output: the file to write.

    Raises:
        UserError: as `collect_metrics`.
    """
    runs = {path: run["iterations"] for path, run in collect_metrics(run_dirs).items()}
    body = ["<h1>ReST<sup>EM</sup> report</h1>", _legend(list(runs))]
    for one in _evaluation_sets(chain.from_iterable(runs.values())):
        body.append(f"<h2>Evaluation set: {escape(one)}</h2>")
        body.append('<p class="note">Percent of problems over iterations; 0 is the base model. ')
        body.append("Bands are 95 % intervals.</p>")
        body += _charts(runs, one)
    if len(body) == 2:
        body.append("<p>No iteration has been evaluated yet.</p>")
    for path, iterations in runs.items():
        body.append(f"<h2>Run: {escape(path)}</h2>")
        body += _run_tables(iterations)
        example = f"{path}/iteration_1/completions:PROBLEM_ID:COMPLETION_INDEX"
        body.append('<p class="note">To draw any completion again: ')
        body.append(f"<code>restem sample --replay {escape(example)}</code></p>")
    return _write_page(output, "ReST-EM report", body)


def write_table(
    output: str | os.PathLike[str], title: str, table: Sequence[Sequence[str]], *, note: str
) -> Path:
    """Writes one self-contained HTML file that holds a table and returns its path.

    Args:
        output: the file to write.
        title: of the page.
        table: the head, then the rows.
        note: what a reader must know of the table.
    """
    head, *rows = table
    heading, below = f"<h1>{escape(title)}</h1>", f'<p class="note">{escape(note)}</p>'
    return _write_page(output, title, [heading, _table(head, rows), below])


def _write_page(output: str | os.PathLike[str], title: str, body: Sequence[str]) -> Path:
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )
    with atomic_path(output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Path(output)


def _iterations(run: RunDir) -> list[dict[str, Any]]:
    if not run.path.is_dir():
        raise UserError(f"run_dir ({run.path}) must be the folder of a run; it does not exist")
    if not (run.iterations() or run.run_json.exists()):
        raise UserError(
            f"run_dir ({run.path}) must be the folder of a run; it holds neither a run.json nor an "
            "iteration_<t>: give the folder that `restem fit` was given as --run_dir"
        )
    entries = []
    for number in run.iterations():
        paths = run.iteration(number)
        entry = {"iteration": number, "finished": paths.manifest.exists()}
        for name, path in (("metrics", paths.metrics), ("funnel", paths.funnel)):
            entry[name] = _mapping(path) if path.exists() else None
        entries.append(entry)
    return entries


def _mapping(path: Path) -> dict[str, Any]:
    if not isinstance(content := read_json(path), dict):
        raise UserError(f"{path} must hold a JSON object, as a run writes it; restore or delete it")
    return content


def _evaluation_sets(iterations: Any) -> list[str]:
    sets = ((entry["metrics"] or {}).get("evaluation") or {} for entry in iterations)
    return list(dict.fromkeys(chain.from_iterable(sets)))


def _evaluation(entry: dict[str, Any], evaluation_set: str) -> dict[str, Any]:
    evaluation = (entry["metrics"] or {}).get("evaluation") or {}
    return evaluation.get(evaluation_set) or {}


def _metric_names(iterations: Any, evaluation_set: str) -> list[str]:
    """Returns greedy_pass@1, then pass@k by k, then maj@k and best@k by k."""
    names = set(chain.from_iterable(_evaluation(entry, evaluation_set) for entry in iterations))
    kinds = ("greedy_pass", "pass", "maj", "best")
    parts = {name: name.partition("@") for name in names}
    known = [name for name, (kind, _, k) in parts.items() if kind in kinds and k.isdecimal()]
    return sorted(known, key=lambda name: (kinds.index(name.split("@")[0]), _k(name)))


def _k(name: str) -> int:
    return int(name.split("@")[1])


def _label(name: str) -> str:
    return name.replace("_", " ")


def _total_s(entry: dict[str, Any]) -> float | None:
    seconds = (entry["metrics"] or {}).get("seconds") or {}
    return seconds.get("total", sum(seconds.values())) if seconds else None


def _rate(estimate: dict[str, Any] | None) -> str:
    if not estimate:
        return "-"
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _align(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(lines)


def _legend(paths: list[str]) -> str:
    swatches = (
        f'<span class="swatch" style="background:{_color(index)}"></span>{escape(path)}'
        for index, path in enumerate(paths)
    )
    return f"<p>Runs: {''.join(swatches)}</p>"


def _color(index: int) -> str:
    return _COLORS[index % len(_COLORS)]


def _run_tables(iterations: list[dict[str, Any]]) -> list[str]:
    tables = []
    for one in _evaluation_sets(iterations):
        names = _metric_names(iterations, one)
        rows = [
            [_title(entry), *(_rate(_evaluation(entry, one).get(name)) for name in names)]
            for entry in iterations
        ]
        head = ["iteration", *map(_label, names)]
        tables.append(f"<h3>{escape(one)} (percent, 95 % interval)</h3>{_table(head, rows)}")
    funnels = [entry["funnel"] or {} for entry in iterations]
    e_steps = [(entry["metrics"] or {}).get("e_step") or {} for entry in iterations]
    head = ["iteration", *map(_label, _STAGES), "acceptance rate", "solved / problems", "verdicts"]
    rows = [
        [_title(entry), *_funnel_cells({**e_step, **funnel})]
        for entry, e_step, funnel in zip(iterations, e_steps, funnels, strict=True)
    ]
    tables.append(f"<h3>From completions to the accepted dataset</h3>{_table(head, rows)}")
    if any(funnel.get("num_skipped") for funnel in funnels):
        tables.append(
            '<p class="note">Not drawn: what the quota of a problem made needless. Rates '
        )
        tables.append("are over what was drawn, so they do not compare with a run that draws all.")
        tables.append("</p>")
    tables += _parity_table(iterations, e_steps)
    seconds = [(entry["metrics"] or {}).get("seconds") or {} for entry in iterations]
    stages = list(dict.fromkeys(chain.from_iterable(seconds)))
    rows = [
        [
            _title(entry),
            _count(e_step.get("num_tokens")),
            _number(e_step.get("tokens_per_s")),
            *(_number(took.get(stage)) for stage in stages),
        ]
        for entry, e_step, took in zip(iterations, e_steps, seconds, strict=True)
    ]
    head = ["iteration", "tokens sampled", "tokens/s", *(f"{_label(name)} (s)" for name in stages)]
    tables.append(f"<h3>Tokens and seconds per stage</h3>{_table(head, rows)}")
    return tables


def _parity_table(iterations: list[dict[str, Any]], e_steps: list[dict[str, Any]]) -> list[str]:
    """Returns the table of how far sampler and trainer agree, if it was measured."""
    rows = []
    for entry, e_step in zip(iterations, e_steps, strict=True):
        if parity := e_step.get("parity"):
            values = (parity[name] for name in _PARITY)
            shown = ["not finite" if value is None else f"{value:.1e}" for value in values]
            verdict = "yes" if parity["within_bounds"] else "NO: do not trust this run"
            rows.append([_title(entry), _count(parity["num_tokens"]), *shown, verdict])
    if not rows:
        return []
    head = ["iteration", "tokens", *_PARITY.values(), "within bounds"]
    return [f"<h3>Log-probabilities: sampler against trainer</h3>{_table(head, rows)}"]


def _title(entry: dict[str, Any]) -> str:
    if entry["iteration"] == 0:
        return "0 (base model)"
    return f"{entry['iteration']}{'' if entry['finished'] else ' (unfinished)'}"


def _funnel_cells(funnel: dict[str, Any]) -> list[str]:
    rate = funnel.get("acceptance_rate")
    verdicts = funnel.get("verdicts") or {}
    completions, *others = (_count(funnel.get(stage)) for stage in _STAGES)
    if skipped := funnel.get("num_skipped"):
        completions += f" ({_count(skipped)} not drawn)"
    return [
        completions,
        *others,
        "-" if rate is None else f"{100 * rate:.1f} %",
        f"{_count(funnel.get('num_solved'))} / {_count(funnel.get('num_problems'))}",
        ", ".join(f"{kind} {count:,}" for kind, count in verdicts.items()) or "-",
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += [
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    ]
    return "<table>" + "\n".join(lines) + "</table>"


# A point is (iteration, value, low, high), the last three in percent.
_Point = tuple[int, float, float, float]


def _charts(runs: dict[str, list[dict[str, Any]]], evaluation_set: str) -> list[str]:
    """Returns a figure per metric, all on the same axes, with a line per run."""
    names = _metric_names(chain.from_iterable(runs.values()), evaluation_set)
    figures = {
        name: [_points(iterations, evaluation_set, name) for iterations in runs.values()]
        for name in names
    }
    points = list(chain.from_iterable(chain.from_iterable(figures.values())))
    x_max = max(1, *(point[0] for point in points)) if points else 1
    y_low = 10 * math.floor(min((point[2] for point in points), default=0) / 10)
    y_high = max(y_low + 10, 10 * math.ceil(max((point[3] for point in points), default=0) / 10))
    return [
        f"<figure><figcaption>{escape(_label(name))}</figcaption>"
        f"{_chart(series, x_max, (y_low, y_high), f'{evaluation_set}: {_label(name)}')}</figure>"
        for name, series in figures.items()
    ]


def _points(iterations: list[dict[str, Any]], evaluation_set: str, name: str) -> list[_Point]:
    found = ((entry["iteration"], _evaluation(entry, evaluation_set)) for entry in iterations)
    return [
        (number, *(100 * evaluation[name][key] for key in ("value", "low", "high")))
        for number, evaluation in found
        if name in evaluation
    ]


def _chart(series: list[list[_Point]], x_max: int, y_range: tuple[int, int], title: str) -> str:
    """Returns an SVG: iterations 0 .. x_max to the right, y_range in percent upwards."""
    y_low, y_high = y_range
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    x_step = math.ceil(x_max / 10)
    y_step = 10 if y_high - y_low <= 50 else 20

    def x(iteration: float) -> str:
        return f"{_LEFT + 8 + (right - _LEFT - 16) * iteration / x_max:.1f}"

    def y(percent: float) -> str:
        return f"{bottom - (bottom - _TOP) * (percent - y_low) / (y_high - y_low):.1f}"

    parts = [
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}" font-size="12" font-family="sans-serif" fill="#444">'
    ]
    for tick in range(y_low, y_high + 1, y_step):
        line = f'x1="{_LEFT}" x2="{right}" y1="{y(tick)}" y2="{y(tick)}"'
        parts.append(f'<line {line} stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(tick)}" dy="4" text-anchor="end">{tick}</text>')
    for tick in range(0, x_max + 1, x_step):
        parts.append(f'<text x="{x(tick)}" y="{bottom + 18}" text-anchor="middle">{tick}</text>')
    middle = (_LEFT + right) // 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">iteration</text>')
    for index, points in enumerate(series):
        color = _color(index)
        upper = [f"{x(point[0])},{y(point[3])}" for point in points]
        lower = [f"{x(point[0])},{y(point[2])}" for point in reversed(points)]
        corners = " ".join(upper + lower)
        line = " ".join(f"{x(point[0])},{y(point[1])}" for point in points)
        parts.append(f'<polygon points="{corners}" fill="{color}" fill-opacity="0.15"/>')
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        for number, value, low, high in points:
            ends = f'x1="{x(number)}" x2="{x(number)}" y1="{y(low)}" y2="{y(high)}"'
            parts.append(f'<line {ends} stroke="{color}" stroke-opacity="0.5"/>')
            parts.append(
                f'<circle cx="{x(number)}" cy="{y(value)}" r="3.5" fill="{color}"><title>'
                f"iteration {number}: {value:.1f} [{low:.1f}, {high:.1f}]</title></circle>"
            )
    return "".join([*parts, "</svg>"])
