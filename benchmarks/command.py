"""The commands `scail2-rt bench` and `demo`. Only click is imported here, so that `--help` answers at once."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from scail2_rt.benchmarks.sprites.quality.command import quality
from scail2_rt.kernels.wording import counted
from scail2_rt.runtime.cli.config import config_option
from scail2_rt.runtime.cli.options import ATTENTION, BACKENDS
from scail2_rt.runtime.cli.output import show, stdout_for
from scail2_rt.runtime.cli.sections import PATH, SectionCommand, debug_option, in_section, option, reporting
from scail2_rt.runtime.cli.types import GpuCount

SECTIONS = ("attention", "kernels", "stages", "forward", "vae", "load", "generate", "serve")
SCALING = ("forward-fp8", "generate", "golden", "forward-bf16", "failures")  # benchmarks.speed.scaling.PARTS
ABOUT = {
    "attention": "Self-attention: speed of every variant and installed peer, and error on six input families.",
    "kernels": "Preparation, cross-attention and row operations: share of the copy ceiling, error against PyTorch.",
    "stages": "The stages of a transformer block, embed and head: speed and error in every precision.",
    "forward": "One forward pass of the transformer, compared with the official code and with torch.compile.",
    "vae": "Decoding a segment and encoding its driving clip, compared with the plain PyTorch layers.",
    "load": "Time from an engine folder, or from a request to an open session, to the first denoising step.",
    "generate": "A complete generation from files to mp4, with resident weights and with a GPU memory limit of 12 GiB.",
    "serve": "The service: time to the first step, time of a video, polling clients, a long queue.",
    "all": "All sections, each in a separate process, merged into one result.",
}
MODELS = ("14b", "1.3b", "tiny")  # benchmarks.speed.models.MODELS
WORK = Path(tempfile.gettempdir()) / "scail2-rt-bench"

RUN_OPTIONS = in_section(
    "What to measure",
    option("--config", type=click.Choice(MODELS), default="14b", show_default=True, help="Model size."),
    option(
        "--weights",
        default="random",
        show_default=True,
        metavar="random|DIR",
        help="Random weights, or an engine folder.",
    ),
    option(
        "--sizes",
        metavar="LIST",
        help="Token counts of standard sizes, or HxWxT, comma-separated.  [default: 48832,95920; tiny: 64x96x13]",
    ),
    option("--runs", type=click.IntRange(min=1), default=5, show_default=True, metavar="N", help="Timed runs per row."),
    option(
        "--attention",
        type=click.Choice(ATTENTION),
        default="auto",
        show_default=True,
        help="Attention variant to measure. auto: all (section attention) or the default variant (other sections).",
    ),
    option(
        "--only",
        multiple=True,
        metavar="PATTERN",
        help="Sections forward, vae, load, generate, serve: measure only rows that match, as in 'forward/fp8/*'. "
        "Repeatable.",
    ),
    option(
        "--segments",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        metavar="N",
        help="Section generate: segments of the clip, to measure the overhead per segment.",
    ),
    option(
        "--gpus",
        type=GpuCount(),
        default=1,
        show_default=True,
        metavar="N|all",
        help="Sections forward, generate: number of GPUs. To compare with one GPU, use bench scaling.",
    ),
)
SERVE_OPTIONS = in_section(
    "Section serve",
    option(
        "--clients",
        type=click.IntRange(min=1),
        default=200,
        show_default=True,
        metavar="N",
        help="Number of polling clients.",
    ),
    option("--queued", type=click.IntRange(min=1), default=2000, show_default=True, metavar="N", help="Queued jobs."),
)
RESULT_OPTIONS = in_section(
    "Results",
    option("--json", "output", type=PATH, metavar="FILE", help="Write the results, updated after every row."),
    option("--report", "html_page", type=PATH, metavar="FILE.html", help="Write an HTML page with plots."),
    option("--summary", "summary_file", type=PATH, metavar="FILE", help="Write the summary as JSON."),
    option(
        "--work",
        type=PATH,
        default=WORK,
        metavar="DIR",
        help="Folder for random engines, the drawn case and its video; kept, because the engines take long to write.  "
        f"[default: {WORK}]",
    ),
)


@click.group()
def bench() -> None:
    """Measure speed, memory and error on this machine, with baselines in the same run.

    \b
    scail2-rt bench all --config 14b --weights random --json r.json --report r.html
    scail2-rt bench compare before.json after.json
    """


def _add_section(name: str) -> None:
    def command(**options: Any) -> None:
        _run(name, **options)

    decorated: Callable[..., Any] = debug_option(RUN_OPTIONS(SERVE_OPTIONS(RESULT_OPTIONS(command))))
    bench.command(name, cls=SectionCommand, help=ABOUT[name])(config_option(decorated, "--config-file"))


for _name in (*SECTIONS, "all"):
    _add_section(_name)


@bench.command("grid", cls=SectionCommand)
@RUN_OPTIONS
@in_section(
    "Cells",
    option(
        "--steps",
        default="4,6,40:5",
        show_default=True,
        metavar="LIST",
        help="Schedules, STEPS or STEPS:GUIDANCE, separated by commas.",
    ),
    option(
        "--limits",
        default="none,24,16,12",
        show_default=True,
        metavar="LIST",
        help="GPU memory limits in GiB, or none.",
    ),
    option(
        "--measure",
        type=click.IntRange(min=2),
        default=6,
        show_default=True,
        metavar="N",
        help="Run at most N steps; longer schedules are computed from them and marked.",
    ),
)
@RESULT_OPTIONS
@debug_option
def grid(**options: Any) -> None:
    """A table of seconds, fps and peak memory by size, steps and GPU memory limit; --json adds every figure."""
    _run("grid", **options)


def _run(section: str, sizes: str | None, html_page: Path | None, summary_file: Path | None, **given: Any) -> None:
    """Measure a section, print and write the results. given: the other fields of `speed.bench.Options`."""
    from scail2_rt.benchmarks.speed.bench import Options
    from scail2_rt.benchmarks.speed.models import default_sizes, parse_sizes
    from scail2_rt.benchmarks.speed.sections import last_line, run_all, run_section, text_of

    if given["gpus"] == "all":
        from scail2_rt.runtime.distributed.gpus import count_gpus

        given["gpus"] = count_gpus("all", "cuda")
    options = Options(sizes=parse_sizes(sizes) if sizes else default_sizes(given["config"]), **given)
    if section == "all":
        results, failed = run_all(options)
    else:
        debug = bool((click.get_current_context().find_root().obj or {}).get("debug"))
        results, failed = run_section(section, options, debug)
    click.echo(text_of(results))
    _write_outputs(results, html_page, summary_file)
    click.echo(last_line(results, failed, options.output))
    if failed:
        raise click.exceptions.Exit(1)


def _write_outputs(results: Any, html_page: Path | None, summary_file: Path | None) -> None:
    if html_page is not None:
        from scail2_rt.benchmarks.report.html import write_page

        write_page(results, html_page)
    if summary_file is not None:
        from scail2_rt.benchmarks.report.goals import summary_document

        summary_file.parent.mkdir(parents=True, exist_ok=True)
        summary_file.write_text(json.dumps(summary_document(results), indent=1, ensure_ascii=False) + "\n")


@bench.command(cls=SectionCommand)
@in_section(
    "What to measure",
    option("--config", type=click.Choice(MODELS), default="14b", show_default=True, help="Model size."),
    option(
        "--gpus",
        type=click.IntRange(min=2),
        default=2,
        show_default=True,
        metavar="N",
        help="GPUs to compare with one.",
    ),
    option(
        "--part",
        "parts",
        type=click.Choice(SCALING),
        multiple=True,
        help="Part to run. Repeatable.  [default: all, in order]",
    ),
    option(
        "--limit", "limit_s", type=float, default=540.0, show_default=True, metavar="S", help="Time limit in seconds."
    ),
)
@in_section(
    "Results",
    option(
        "--json",
        "output",
        type=PATH,
        metavar="FILE",
        required=True,
        help="Write the results, updated after every part.",
    ),
    option("--summary", type=PATH, metavar="FILE", help="Write the summary as JSON."),
    option("--work", type=PATH, default=WORK, metavar="DIR", help=f"Folder for random engines.  [default: {WORK}]"),
)
@debug_option
def scaling(parts: tuple[str, ...], **options: Any) -> None:
    """Compare several GPUs of this host with one GPU: forward passes, guidance, complete generations, the golden
    fixtures (SCAIL2_GOLDEN names their folder) and failures. Without a GPU it runs CPU processes, as a test only; the
    times are not meaningful then."""
    from scail2_rt.benchmarks.speed.scaling import ScalingOptions, run

    document = run(ScalingOptions(parts=parts or SCALING, **options))
    click.echo(json.dumps(document["summary"], indent=1))
    if any("failure" in part for part in document["parts"].values()):
        raise click.exceptions.Exit(1)


@bench.command(cls=SectionCommand)
@click.argument("before", type=PATH)
@click.argument("after", type=PATH)
@debug_option
def compare(before: Path, after: Path) -> None:
    """Compare two results row by row. Exit code 1 if AFTER is worse by more than the noise: for a time 3 % or twice the
    spread of the runs, whichever is larger; for an error 10 %."""
    from scail2_rt.benchmarks.report.compare import compare_results
    from scail2_rt.benchmarks.report.record import load

    comparison = compare_results(load(before), load(after))
    click.echo(comparison.text)
    click.echo(json.dumps(comparison.document(), ensure_ascii=False))
    if comparison.regressions:
        raise click.exceptions.Exit(1)


@bench.command(cls=SectionCommand)
@click.argument("files", type=PATH, nargs=-1, required=True)
@click.option("-o", "--output", type=PATH, required=True, help="The merged result.")
@debug_option
def merge(files: tuple[Path, ...], output: Path) -> None:
    """Merge several results of one model. Of rows with the same name, the last measured one is kept."""
    from scail2_rt.benchmarks.report.record import load
    from scail2_rt.benchmarks.report.record import merge as merged

    results = merged([load(file) for file in files])
    results.save(output)
    click.echo(f"{output}: {counted(len(results.rows), 'row')} of {counted(len(results.runs), 'run')}")


@bench.command("report", cls=SectionCommand)
@click.argument("file", type=PATH)
@click.option("-o", "--output", "html_page", type=PATH, help="HTML page with plots.")
@click.option("--summary", "summary_file", type=PATH, help="Summary as JSON.")
@debug_option
def report_command(file: Path, html_page: Path | None, summary_file: Path | None) -> None:
    """Print a saved result with its goals. Optionally write its HTML page and its summary."""
    from scail2_rt.benchmarks.report.record import load
    from scail2_rt.benchmarks.speed.sections import last_line, text_of

    results = load(file)
    click.echo(text_of(results))
    _write_outputs(results, html_page, summary_file)
    failed = [row.name for row in results.rows.values() if row.failure]
    click.echo(last_line(results, failed, file))


bench.add_command(quality)


DEMO_OPTIONS = in_section(
    "Options",
    option(
        "-o",
        "--output",
        type=PATH,
        default=Path("out"),
        show_default=True,
        metavar="DIR",
        help="Folder for the engines, the case, demo.mp4 and its contact sheet.",
    ),
    option(
        "--backend",
        type=click.Choice(BACKENDS),
        default="auto",
        show_default=True,
        help="Executor to run. auto is torch, because the first export for ONNX Runtime takes minutes.",
    ),
)


@click.command(cls=SectionCommand)
@DEMO_OPTIONS
@reporting
def demo(output: Path, backend: str, as_json: bool) -> None:
    """Try the program on any machine: build engines of a small trained model and animate a drawn case with audio.

    The true video is known, so the demo prints the PSNR of the result and writes a contact sheet. It also prints the
    `generate` command that makes the same video again."""
    from scail2_rt.benchmarks.sprites.demo import run_demo

    with stdout_for(as_json):
        result, text = run_demo(output, backend)
    show(result, text, as_json)
