"""A result as one HTML file: goals, time by kind of work, roofline, all rows, and device and date of the runs."""

import json
from html import escape
from pathlib import Path

from scail2_rt.benchmarks.report.goals import goals_table, summary
from scail2_rt.benchmarks.report.plots import roofline, stacked_bars
from scail2_rt.benchmarks.report.record import Results
from scail2_rt.benchmarks.report.table import table

_STYLE = (
    "body{font-family:sans-serif;max-width:1100px;margin:2em auto;padding:0 2em}"
    "pre{overflow-x:auto;background:#f6f6f6;padding:1em}"
)


def write_page(results: Results, path: Path) -> None:
    """Write the HTML page of a result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html(results), encoding="utf-8")


def html(results: Results) -> str:
    """The HTML page of a result, without external resources."""
    parts = [f"<h1>scail2-rt bench: {escape(results.config)}</h1>"]
    for run in results.runs:
        about = (str(run.get(key, "")) for key in ("date", "device", "command"))
        parts.append(f"<p>{escape(' · '.join(about))}</p>")
    parts += ["<h2>Goals</h2>", f"<pre>{escape(goals_table(results))}</pre>"]
    for title, prefix in (
        ("A forward pass", "forward/"),
        ("A generation", "generate/"),
        ("To the first step", "load/"),
    ):
        bars = {name: row.breakdown for name, row in results.rows.items() if name.startswith(prefix) and row.breakdown}
        if bars:
            parts += [f"<h2>Where the time goes: {title.lower()}</h2>", stacked_bars(bars)]
    parts += _roofline(results)
    parts += ["<h2>All rows</h2>", f"<pre>{escape(table(results.rows.values()))}</pre>"]
    parts += ["<h2>Summary</h2>", f"<pre>{escape(json.dumps(summary(results), indent=1))}</pre>"]
    versions = [dict(run.get("versions", {})) for run in results.runs[:1]]
    parts += ["<h2>Versions</h2>", f"<pre>{escape(json.dumps(versions, indent=1))}</pre>"]
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>scail2-rt bench</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}{body}</html>\n'


def _roofline(results: Results) -> list[str]:
    """The roofline of all rows with both FLOP and bytes."""
    points = {
        name: (row.values["flops"] / row.values["bytes"], row.values["tflops"])
        for name, row in results.rows.items()
        if row.measured and {"flops", "bytes", "tflops"} <= row.values.keys()
    }
    tops = {
        name.removeprefix("ceiling/"): row.values["tflops"]
        for name, row in results.rows.items()
        if row.kind == "ceiling" and "tflops" in row.values
    }
    if not points or not tops:
        return []
    memory = results.value("ceiling/copy", "tbytes_s")
    return ["<h2>Roofline</h2>", roofline(points, tops, memory)]
