"""Run one section in this process, or all sections, each in a separate process.

`all` keeps the result of each section as a file beside the merged one, so that an interruption, a crash or a full GPU
in one section does not affect the others.
"""

import importlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from scail2_rt.benchmarks.command import SECTIONS
from scail2_rt.benchmarks.report.goals import goals_table, judged, summary
from scail2_rt.benchmarks.report.record import Results, load, merge
from scail2_rt.benchmarks.report.table import table
from scail2_rt.benchmarks.speed.bench import Bench, Options
from scail2_rt.benchmarks.speed.grid import grid_table
from scail2_rt.benchmarks.speed.models import model
from scail2_rt.kernels.errors import InputError, Scail2Error


def run_section(section: str, options: Options, debug: bool = False) -> tuple[Results, tuple[str, ...]]:
    """Measure one section. Returns (results, names of failed rows). Raises InputError for a folder without engines."""
    if options.folder is not None and not (options.folder / "manifest.json").is_file():
        raise InputError(f"--weights {options.folder} is not an engine folder. Give an engine folder or `random`.")
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Bench.start(options, model(options.config), section)
    bench.debug = debug
    importlib.import_module(f"scail2_rt.benchmarks.speed.{section}").run(bench)
    bench.finish()
    return bench.results, bench.failures


def run_all(options: Options) -> tuple[Results, tuple[str, ...]]:
    """Measure all sections in fresh processes with the same options; the merged file is updated after each. Returns
    (results, names of failed sections). Raises Scail2Error if no section has a result."""
    output = options.output or options.work / "results.json"
    parts = output.with_name(f"{output.stem}.sections")
    done: list[Results] = []
    failed: list[str] = []
    for section in SECTIONS:
        part = parts / f"{section}.json"
        part.unlink(missing_ok=True)
        print(f"== {section}", file=sys.stderr, flush=True)
        command = [
            sys.executable,
            "-m",
            "scail2_rt.runtime.cli.main",
            "bench",
            section,
            *_words(options),
            "--json",
            str(part),
        ]
        code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
        if part.is_file():
            done.append(load(part))
            merge(done).save(output)
        if code:
            failed.append(section)
    if not done:
        raise Scail2Error("No section of the benchmark has a result. Read the messages above.")
    return merge(done), tuple(failed)


def _words(options: Options) -> list[str]:
    """The options as command-line words of `scail2-rt bench SECTION`, except those for output files."""
    words = ["--config", options.config, "--weights", options.weights, "--runs", str(options.runs)]
    words += ["--attention", options.attention, "--work", str(options.work), "--segments", str(options.segments)]
    words += ["--gpus", str(options.gpus)]
    words += ["--clients", str(options.clients), "--queued", str(options.queued)]
    words += ["--sizes", ",".join(map(str, options.sizes))]
    return words + [word for pattern in options.only for word in ("--only", pattern)]


def text_of(results: Results) -> str:
    cells = [row for row in results.rows.values() if row.section == "grid"]
    grid = f"{grid_table(cells)}\n\n" if cells else ""
    return f"{table(results.rows.values())}\n\n{grid}{goals_table(results)}"


def last_line(results: Results, failed: Sequence[str], output: Path | None) -> str:
    """The JSON object in the last line of a run's output."""
    goals = {goal.key: status for goal, _, status in judged(results)}
    document = {"config": results.config, "summary": summary(results), "goals": goals, "failed": list(failed)}
    if output is not None:
        document["json"] = str(output)
    return json.dumps(document, ensure_ascii=False)
