"""The command `scail2-rt bench quality`. Imports only click, so that `--help` is fast."""

import json
import tempfile
from pathlib import Path
from typing import Any

import click

from scail2_rt.runtime.cli.options import ATTENTION, BACKENDS, PRECISIONS, SCHEDULERS
from scail2_rt.runtime.cli.sections import PATH, SectionCommand, debug_option, in_section, option

WORK = Path(tempfile.gettempdir()) / "scail2-rt-quality"

MEASURE_OPTIONS = in_section(
    "What to measure",
    option("--engines", type=PATH, metavar="DIR", help="Engine folder.  [default: built from --checkpoint in --work]"),
    option(
        "--checkpoint", type=PATH, metavar="DIR", help="Checkpoint.  [default: the one that comes with the package]"
    ),
    option("--cases", type=click.IntRange(min=1), default=4, show_default=True, metavar="N", help="Cases per task."),
    option("--tasks", metavar="LIST", help="Tasks to run, comma-separated.  [default: all]"),
    option(
        "--variants",
        "table",
        flag_value="variants",
        help="Compare precisions, attention variants, guidance, schedulers and step counts on a few tasks.",
    ),
    option(
        "--masks",
        type=click.Choice(["true", "made"]),
        default="true",
        show_default=True,
        help="true: the true masks. made: additionally masks by the package's small SAM 2, from detected boxes.",
    ),
    option("--long", "table", flag_value="long", help="Compare options for long clips, on clips of five segments."),
)
RUN_OPTIONS = in_section(
    "How to run",
    option(
        "--precision",
        type=click.Choice(PRECISIONS),
        default="fp32",
        show_default=True,
        help="Precision of engines to build.",
    ),
    option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="Backend."),
    option("--attention", type=click.Choice(ATTENTION), default="auto", show_default=True, help="Self-attention."),
    option("--scheduler", type=click.Choice(SCHEDULERS), help="Scheduler.  [default: that of the benchmark]"),
    option("--steps", type=click.IntRange(min=1), metavar="N", help="Denoising steps."),
    option("--shift", type=float, metavar="X", help="Shift of the noise levels."),
    option("--guidance", type=float, metavar="X", help="Guidance scale; 1 or less: one pass per step."),
)
RESULT_OPTIONS = in_section(
    "Results",
    option(
        "--json",
        "output",
        type=PATH,
        metavar="FILE",
        help="Write the results. Rows in an existing file are not measured again.",
    ),
    option("--sheets", type=PATH, metavar="DIR", help="Write contact sheets as PNG."),
    option("--compare", type=PATH, metavar="FILE", help="Exit with code 1 if PSNR differs from this result."),
    option(
        "--tolerance",
        type=float,
        default=0.3,
        show_default=True,
        metavar="DB",
        help="Largest difference that --compare accepts.",
    ),
    option("--work", type=PATH, default=WORK, metavar="DIR", help=f"Folder for engines and cases.  [default: {WORK}]"),
)


@click.command(cls=SectionCommand)
@MEASURE_OPTIONS
@RUN_OPTIONS
@RESULT_OPTIONS
@debug_option
def quality(
    tasks: str | None,
    table: str | None,
    compare: Path | None,
    tolerance: float,
    **given: Any,
) -> None:
    """Compare videos of the small sprite model with the correct output, which is known because the cases are drawn.

    Runs every task on held-out characters and motions, with trivial baselines and the VAE's round trip as ceiling."""
    from scail2_rt.benchmarks.report.record import load
    from scail2_rt.benchmarks.sprites.quality import quality_table as tables
    from scail2_rt.benchmarks.sprites.quality.quality import QualityOptions, run_quality
    from scail2_rt.benchmarks.sprites.shipped import shipped_checkpoint

    sampling = {name: given.pop(name) for name in ("scheduler", "steps", "shift", "guidance")}
    if given["engines"] is None and given["checkpoint"] is None:
        given["checkpoint"] = shipped_checkpoint()
    options = QualityOptions(
        tasks=tuple(tasks.split(",")) if tasks else (),
        table=table or "tasks",
        sampling={name: value for name, value in sampling.items() if value is not None},
        **given,
    )
    expected = None if compare is None else load(compare)
    debug = bool((click.get_current_context().find_root().obj or {}).get("debug"))
    results = run_quality(options, debug)
    click.echo(tables.quality_table(results))
    failed = [row.name for row in results.rows.values() if row.failure]
    if expected is not None:
        found = tables.differences(expected, results)
        click.echo("\n" + tables.difference_table(found, tolerance))
        if not found:
            failed.append(f"{compare} and this result have no case in common")
        failed += [f"{d.name}: {d.figure} {d.change:+.2f} dB" for d in found if abs(d.change) > tolerance]
    summary = {"/".join(key): tables.shown(value) for key, value in tables.means(results.rows.values()).items()}
    document = {"summary": summary, "failed": failed, "json": None if options.output is None else str(options.output)}
    click.echo(json.dumps(document, ensure_ascii=False))
    if failed:
        raise click.exceptions.Exit(1)
