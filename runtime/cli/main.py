"""`scail2-rt`: the command line. Read this first.

    make-checkpoint  random weights in the official layout      export.checkpoint.random_checkpoint
    build-engines    checkpoint → engine folder                 export.checkpoint → engines.build
    generate         engines + case → video                     runtime.jobs → session → pipeline
    masks            check, show, repair and make masks         runtime.cli.mask_commands → runtime.masks
    verify           engine folder against its checkpoint       engines.verify
    export-onnx      checkpoint → ONNX files for other tools    engines.build.onnx_folder
    doctor           hardware and libraries of this machine     runtime.jobs.doctor
    demo             all steps on a case with a known answer    benchmarks.sprites.demo
    bench            speed, memory and error, with baselines    benchmarks
    convert          checkpoint → one safetensors file          engines.build.convert
    download         the official checkpoint from the hub       runtime.jobs.download
    inspect          identify a file or folder                  runtime.jobs.inspection
    serve            engines → videos over HTTP                 runtime.serve
    comfyui          nodes in a ComfyUI folder                  runtime.comfyui.installing

Commands import modules when they run, so that `--help` is fast. Errors are one line on stderr, with exit code 2 for a
mistake of the user, 1 for a fault and 130 for Ctrl-C; `--debug` shows the traceback. With `--json`, stdout holds one
JSON object and nothing else, also for an error.
"""

import importlib
import importlib.metadata
import json
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from scail2_rt.kernels.wording import counted
from scail2_rt.runtime.cli import options as o
from scail2_rt.runtime.cli.comfyui_commands import comfyui
from scail2_rt.runtime.cli.config import config_file, config_option
from scail2_rt.runtime.cli.files_commands import convert, download, inspect
from scail2_rt.runtime.cli.mask_commands import masks
from scail2_rt.runtime.cli.output import separate_parts, show, stdout_for
from scail2_rt.runtime.cli.repeating import repeated
from scail2_rt.runtime.cli.sections import PATH, SectionCommand, debug_option, reporting
from scail2_rt.runtime.cli.serve_command import serve
from scail2_rt.runtime.cli.start import INTERRUPTED
from scail2_rt.runtime.jobs.stopping import forget_postponed

if TYPE_CHECKING:
    from scail2_rt.engines.build.build import BuildReport

HIGHER = {  # commands of a higher layer, imported when needed
    "bench": "scail2_rt.benchmarks.command:bench",
    "demo": "scail2_rt.benchmarks.command:demo",
}
SECTIONS = {  # of `--help`: command → description
    "Make videos": {
        "demo": "Try the program with a small model that comes with it.",
        "generate": "Generate a video from a reference image and a driving clip.",
        "masks": "Make, check, show and repair colour masks.",
        "serve": "Serve videos over HTTP.",
        "comfyui": "Install the nodes into ComfyUI.",
    },
    "Checkpoints and engines": {
        "download": "Download the official checkpoint, or a segmenter.",
        "build-engines": "Build an engine folder from a checkpoint.",
        "inspect": "Identify a file or folder.",
        "verify": "Test an engine folder against its checkpoint.",
        "convert": "Write the transformer of a checkpoint as one safetensors file.",
        "export-onnx": "Write the networks of a checkpoint as ONNX files.",
        "make-checkpoint": "Write a small checkpoint of random weights, for tests.",
    },
    "This machine": {
        "doctor": "Show hardware, libraries and the backend that would be used.",
        "bench": "Measure speed, memory and error.",
    },
}
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class CommandGroup(click.Group):
    """A group that also has the commands of `HIGHER`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *HIGHER})

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section, commands in SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl(list(commands.items()))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in HIGHER:
            return super().get_command(ctx, cmd_name)
        module, name = HIGHER[cmd_name].split(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=CommandGroup, context_settings=CONTEXT, invoke_without_command=True)
@click.version_option(importlib.metadata.version("scail2-rt"), prog_name="scail2-rt")
@debug_option
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Animate characters with SCAIL-2. Build engines from a checkpoint once, then turn a reference image and a driving
    clip into a new video.

    \b
    Start here:  scail2-rt demo
    Then:        scail2-rt build-engines SCAIL-2/ -o engines/
                 scail2-rt generate engines/ --case my_case/ -o out.mp4
    Help:        scail2-rt COMMAND --help
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@cli.command(cls=SectionCommand)
@config_option
@click.argument("checkpoint", type=PATH)
@o.BUILD_OPTIONS
@o.COMPONENT_OPTIONS
@reporting
def build_engines(checkpoint: Path, as_json: bool, **options: Any) -> None:
    """Build an engine folder from CHECKPOINT, a SCAIL-2 folder or a *.safetensors file.

    Run the same command again to continue an interrupted build, or to check a folder and repair damaged files."""
    from scail2_rt.engines.build.build import BuildRequest, build
    from scail2_rt.engines.registry import backend
    from scail2_rt.engines.tensorrt_backend.profiles import plan_options
    from scail2_rt.export.checkpoint.lora import parse_lora
    from scail2_rt.export.checkpoint.open import open_checkpoint
    from scail2_rt.runtime.cli.progress import BuildLines

    parts = separate_parts(options)
    request = BuildRequest(
        checkpoint,
        options["output"],
        tuple(options["backends"]),
        options["precision"],
        tuple(parse_lora(lora) for lora in options["loras"]),
        options["lora_partial"],
        options["rebuild"],
        parts,
        plan_options(options["max_picture"], options["workspace_gib"], options["targets"]),
        tuple(options["stages"]),
    )
    with stdout_for(as_json):
        report = build(request, open_checkpoint(checkpoint, **parts), BuildLines())
    text = (
        f"{report.directory}: {build_summary(report)}; {counted(report.stages, 'stage')} in {report.precision}, "
        f"{report.weight_bytes / 2**20:.1f} MiB of weights, {report.folder_bytes / 2**20:.1f} MiB in all"
    )
    if any(backend(name).compiles_kernels for name in report.added):
        text += compiled_kernels(Path(report.directory))
    show(report, text + lora_lines(report.loras), as_json)


@cli.command(cls=SectionCommand)
@config_option
@click.argument("engines", type=PATH, required=False, metavar="ENGINES", callback=o.engines_or_server)
@o.INPUT_OPTIONS
@o.MAKING_OPTIONS
@o.PROMPT_OPTIONS
@o.OUTPUT_OPTIONS
@o.SAMPLING_OPTIONS
@o.LONG_CLIP_OPTIONS
@o.ENGINE_OPTIONS
@o.SERVER_OPTIONS
@reporting
def generate(engines: Path | None, server: str | None, ray_address: str | None, as_json: bool, **options: Any) -> None:
    """Generate a video with the engine folder ENGINES: the reference character performs the motion of the driving clip.

    If a segmenter is installed (`scail2-rt download --segmenter sam2`), an image and a driving clip are enough: their
    masks are made first and kept beside the output. A run report, <output>.json, is written beside the video."""
    if engines is not None and ray_address is None and not options["dry_run"]:
        from scail2_rt.kernels.ahead import start_early

        start_early(engines, options["backend"])
    from scail2_rt.runtime.cli.batch_lines import typed_lines
    from scail2_rt.runtime.cli.progress import open_progress
    from scail2_rt.runtime.distributed.torchrun import lead_or_follow
    from scail2_rt.runtime.jobs.batch import run_batch
    from scail2_rt.runtime.jobs.options import GenerateOptions
    from scail2_rt.runtime.jobs.run import run_single

    if options["from_video"] is not None:
        options = repeated(options, remote=server is not None)
    if options["batch"] is not None:
        options["lines"] = typed_lines(click.get_current_context(), options["batch"])
    given = GenerateOptions(engines=engines or Path(), config=config_file(), **options)
    many = given.batch is not None or bool(given.seeds)
    if ray_address is not None and (server is not None or not many):
        raise click.UsageError(
            "--ray distributes several videos. Use it with --batch FILE or --seeds, without --server."
        )
    if server is None and ray_address is None:
        lead_or_follow()
    with stdout_for(as_json), open_progress() as listener:
        if server is not None:
            from scail2_rt.runtime.serve.client import run_remote

            outcome = run_remote(given, server, listener)
        elif ray_address is not None:
            from scail2_rt.runtime.cluster.batch import run_batch_on_ray

            outcome = run_batch_on_ray(given, ray_address)
        else:
            outcome = run_batch(given, lambda: listener) if many else run_single(given, listener)
    show(outcome.document, outcome.text, as_json)
    if outcome.failed:
        raise click.exceptions.Exit(1)


@cli.command(cls=SectionCommand)
@click.argument("directory", type=PATH)
@o.CHECKPOINT_OPTIONS
@reporting
def make_checkpoint(directory: Path, preset: str, seed: int, as_json: bool) -> None:
    """Write a small checkpoint of random weights to DIRECTORY, in the official folder layout.

    Its videos are coloured noise. Use it to try the program and for tests."""
    from scail2_rt.export.checkpoint.random_checkpoint import make_checkpoint as make
    from scail2_rt.runtime.jobs.stopping import stop_tidily

    stop_tidily()
    with stdout_for(as_json):
        make(directory, preset=preset, seed=seed)
    files = {str(f.relative_to(directory)): f.stat().st_size for f in sorted(directory.rglob("*")) if f.is_file()}
    lines = [f"{directory}: random weights, preset {preset}, seed {seed}"]
    lines += [f"  {size:>12,} bytes  {name}" for name, size in files.items()]
    show({"directory": str(directory), "preset": preset, "seed": seed, "files": files}, "\n".join(lines), as_json)


@cli.command(cls=SectionCommand)
@click.argument("checkpoint", type=PATH)
@o.EXPORT_OPTIONS
@o.COMPONENT_OPTIONS
@reporting
def export_onnx(checkpoint: Path, as_json: bool, **options: Any) -> None:
    """Write the networks of CHECKPOINT as ONNX files, for other tools.

    --layout stages writes one file per engine stage. --layout monolithic writes the transformer as one graph with the
    operators Attention and RotaryEmbedding (opset 23). All weights are in one file beside the graphs."""
    from scail2_rt.engines.build.onnx_folder import export_onnx as export
    from scail2_rt.export.checkpoint.lora import parse_lora
    from scail2_rt.export.checkpoint.open import COMPONENTS, open_checkpoint
    from scail2_rt.runtime.cli.progress import BuildLines
    from scail2_rt.runtime.jobs.stopping import stop_tidily

    stop_tidily()
    alone = options["layout"] == "monolithic"  # needs the transformer only
    parts = separate_parts(options)
    with stdout_for(as_json):
        opened = open_checkpoint(checkpoint, **({} if alone else parts), components=("dit",) if alone else COMPONENTS)
        report = export(
            opened,
            options["output"],
            options["layout"],
            options["precision"],
            tuple(parse_lora(lora) for lora in options["loras"]),
            options["lora_partial"],
            BuildLines(),
            options["check"],
        )
    text = (
        f"{report.directory}: {counted(len(report.graphs), 'graph')} in {report.precision}, "
        f"{report.weight_bytes / 2**20:.1f} MiB of weights, written in {report.wall_s:.1f} s"
        f"{f'; {report.taken_by} accepts every node' if report.taken_by else ''}"
    )
    show(report, text + lora_lines(report.loras), as_json)


@cli.command(cls=SectionCommand)
@click.argument("engines", type=PATH)
@o.VERIFY_OPTIONS
@o.COMPONENT_OPTIONS
@reporting
def verify(engines: Path, checkpoint: Path, as_json: bool, **options: Any) -> None:
    """Test the engine folder ENGINES against the checkpoint that it was built from.

    Compares all files with their checksums and hashes, and every stored value with the checkpoint. Runs every stage of
    every executor on random inputs, compares it with the fp32 stage and times it; on a GPU also as a CUDA graph. If
    something fails, the exit code is 1 and the last lines say how to repair it."""
    from scail2_rt.engines.verify.verify import VerifyRequest, open_for
    from scail2_rt.engines.verify.verify import verify as run_verify
    from scail2_rt.runtime.cli.progress import BuildLines
    from scail2_rt.runtime.jobs.card_report import block_for_report

    request = VerifyRequest(
        engines, options["backends"], options["repeats"], options["rows"], options["seed"], options["against"]
    )
    parts = separate_parts(options)
    with stdout_for(as_json):
        opened = open_for(engines, checkpoint, parts)
        report = run_verify(request, opened, lambda line: click.echo(line, err=as_json), BuildLines())
        text = report.summary
        if block := block_for_report(report):
            text += f"\n\nPaste this block into a report:\n{block}"
    show(report, text, as_json)
    if not report.passed:
        raise click.exceptions.Exit(1)


@cli.command(cls=SectionCommand)
@click.argument("engines", type=PATH, required=False)
@reporting
def doctor(engines: Path | None, as_json: bool) -> None:
    """Show the hardware and libraries of this machine, the backend that would be used and why, and how to be faster.

    With ENGINES, also open that engine folder and compare its files with their checksums."""
    from scail2_rt.runtime.cli.progress import BuildLines
    from scail2_rt.runtime.jobs.doctor import diagnose

    with stdout_for(as_json):
        found = diagnose(engines, BuildLines())
    show(found, found.text, as_json)


for command in (comfyui, convert, download, inspect, masks, serve):
    cli.add_command(command)


def compiled_kernels(directory: Path) -> str:
    """Compile the GPU kernels and return a line about it, with a leading line break; "" without a GPU."""
    import torch

    from scail2_rt.runtime.session.warm import warm_kernels

    if not torch.cuda.is_available():
        return ""
    click.echo("compiling the GPU kernels; this takes longest the first time", err=True)
    return f"\n{warm_kernels(directory)}"


def build_summary(report: "BuildReport") -> str:
    """Return a clause about a build: repaired stages, new executors, seconds."""
    done = [f"repaired {', '.join(report.repaired)}"] if report.repaired else []
    done += ["checksums added"] if report.sums_added else []
    if report.added:
        done.append(f"built for {', '.join(report.added)}")
    elif not (done or report.up_to_date):
        done.append("the requested plans are built")
    return f"{', '.join(done)} in {report.wall_s:.1f} s" if done else "nothing to do"


def lora_lines(loras: Sequence[Any]) -> str:
    """Return a line per fused LoRA, which also names the modules that were left out."""
    return "".join(f"\n{lora.text}" for lora in loras)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. Errors become one line on stderr and an exit code. (The console script is `start.main`.)"""
    flags: dict[str, Any] = {}
    try:
        try:
            code = cli.main(arguments, prog_name="scail2-rt", standalone_mode=False, obj=flags)
        finally:
            forget_postponed()
        sys.exit(code if isinstance(code, int) else 0)
    except (Exception, KeyboardInterrupt) as error:
        message, code = explain(error)
        if code == INTERRUPTED and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process during cleanup
        file = flags.get("config")
        if code == 2 and file is not None and str(file) not in message:
            message += f" (Options were also read from {file}.)"
        if flags.get("debug"):
            traceback.print_exc()
        click.echo(f"error: {message}", err=True)
        if flags.get("as_json"):
            click.echo(json.dumps({"error": message, "exit_code": code}, ensure_ascii=False))
        sys.exit(code)


def explain(error: BaseException) -> tuple[str, int]:
    """Return (one line for the user, exit code)."""
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return "interrupted", INTERRUPTED
    from scail2_rt.kernels.errors import Scail2Error

    if isinstance(error, click.ClickException):
        ctx = getattr(error, "ctx", None)
        message = one_line(error.format_message())
        return message if ctx is None else f"{message.rstrip('.')} (see {ctx.command_path} --help).", 2
    if isinstance(error, Scail2Error):
        return one_line(str(error)), error.exit_code
    if _was_interrupted(error):
        return "interrupted", INTERRUPTED
    return f"{type(error).__name__}: {one_line(str(error))} (a fault of the program; run with --debug for details)", 1


def _was_interrupted(error: BaseException | None) -> bool:
    """Return whether Ctrl-C caused this error. An interrupted import may raise another error instead."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    main()
