"""The command `scail2-rt bench quality`. Only click is imported here, so that `--help` answers at once."""

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
    option("--engines", type=PATH, metavar="DIR", help="Engine folder.  [default: made from --checkpoint in --work]"),
    option(
        "--checkpoint", type=PATH, metavar="DIR", help="Checkpoint.  [default: the one that comes with the package]"
    ),
    option(
        "--cases", type=click.IntRange(min=1), default=4, show_default=True, metavar="N", help="Cases of each task."
    ),
    option("--tasks", metavar="LIST", help="Some of the tasks, separated by commas.  [default: all]"),
    option(
        "--variants",
        "table",
        flag_value="variants",
        help="Also precisions, attention variants, guidance, schedulers and step counts, on a few tasks.",
    ),
    option(
        "--masks",
        type=click.Choice(["true", "made"]),
        default="true",
        show_default=True,
        help="made: also with masks that the small SAM 2 of the package makes, from boxes that it finds.",
    ),
    option("--long", "table", flag_value="long", help="Ways to hold a clip of five segments together, instead."),
)
RUN_OPTIONS = in_section(
    "How to run",
    option(
        "--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True, help="Of engines made here."
    ),
    option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="Executor to run."),
    option("--attention", type=click.Choice(ATTENTION), default="auto", show_default=True, help="Self-attention."),
    option("--scheduler", type=click.Choice(SCHEDULERS), help="Instead of the benchmark's own, as the next three."),
    option("--steps", type=click.IntRange(min=1), metavar="N", help="Denoising steps."),
    option("--shift", type=float, metavar="X", help="Shift of the noise levels."),
    option("--guidance", type=float, metavar="X", help="Strength of the prompt; 1 or less: one pass per step."),
)
RESULT_OPTIONS = in_section(
    "Results",
    option("--json", "output", type=PATH, metavar="FILE", help="Save every row there; rows it has are not run again."),
    option("--sheets", type=PATH, metavar="DIR", help="Write contact sheets as PNG."),
    option("--compare", type=PATH, metavar="FILE", help="Exit code 1 if PSNR is not that of this result."),
    option(
        "--tolerance",
        type=float,
        default=0.3,
        show_default=True,
        metavar="DB",
        help="How far --compare lets it be off.",
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
    """Videos of the small sprite model against the right answers, which are known because the cases are drawn.

    Every task on characters and motions that training never saw, beside trivial baselines and the VAE's ceiling."""
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
