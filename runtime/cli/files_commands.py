"""The commands about files: `convert`, `download`, `inspect`. Only click is imported here, so that `--help` answers at
once."""

from pathlib import Path
from typing import Any

import click

from scail2_rt.runtime.cli.options import COMPONENT_OPTIONS, LORA_OPTIONS
from scail2_rt.runtime.cli.output import parts_apart, show, stdout_for
from scail2_rt.runtime.cli.sections import PATH, SectionCommand, in_section, option, reporting

DTYPES = ("bf16", "fp16", "fp32")  # engines.build.convert_target.DTYPES
REPOSITORY = "zai-org/SCAIL-2"  # runtime.download.REPOSITORY

CONVERT_OPTIONS = in_section(
    "Convert",
    option("-o", "--output", type=PATH, required=True, metavar="FILE.safetensors", help="The file to write."),
    option(
        "--dtype",
        type=click.Choice(DTYPES),
        help="Type of the transformer's matrices; norms, modulation, time embedding and head stay fp32.  [default: "
        "16-bit ones as they are, others bf16]",
    ),
    option(
        "--all",
        "everything",
        is_flag=True,
        help="Write VAE, umT5, CLIP and tokenizer beside it too: the folder is then a whole checkpoint.",
    ),
    *LORA_OPTIONS,
    option("--overwrite", is_flag=True, help="Replace an output, or unfinished work, of something else."),
)
DOWNLOAD_OPTIONS = in_section(
    "Download",
    option("--repo", default=REPOSITORY, show_default=True, metavar="NAME", help="Repository on the hub."),
    option(
        "--segmenter",
        type=click.Choice(["sam2", "sam3"]),
        help="What makes masks instead of the checkpoint: SAM 2.1 with Grounding DINO, or SAM 3 for those with access. "
        "Into DIRECTORY, or into the cache folder, where `generate` and `masks make` look.",
    ),
    option("--revision", default="main", show_default=True, metavar="NAME", help="Branch, tag or commit."),
)


@click.command(cls=SectionCommand)
@click.argument("checkpoint", type=PATH)
@CONVERT_OPTIONS
@COMPONENT_OPTIONS
@reporting
def convert(checkpoint: Path, as_json: bool, **options: Any) -> None:
    """Write the transformer of CHECKPOINT (any layout that build-engines reads) as one safetensors file with Wan names.

    Little memory, whatever the size; an interrupted conversion continues; a second call does nothing."""
    from scail2_rt.engines.build.convert import convert as run
    from scail2_rt.engines.build.convert_target import ConvertRequest
    from scail2_rt.export.checkpoint.lora import parse_lora
    from scail2_rt.export.checkpoint.open import COMPONENTS, open_checkpoint
    from scail2_rt.runtime.cli.progress import BuildLines

    parts = parts_apart(options)
    everything = options["everything"]
    if parts and not everything:
        raise click.UsageError("--vae, --t5, --clip and --tokenizer are for --all: else only the transformer is read")
    request = ConvertRequest(
        options["output"],
        options["dtype"],
        everything,
        options["overwrite"],
        tuple(parse_lora(lora) for lora in options["loras"]),
        options["lora_partial"],
    )
    with stdout_for(as_json):
        opened = open_checkpoint(checkpoint, **parts, components=COMPONENTS if everything else ("dit",))
        report = run(request, opened, BuildLines())
    show(report, report.text, as_json)


@click.command(cls=SectionCommand)
@click.argument("directory", type=PATH, required=False)
@DOWNLOAD_OPTIONS
@reporting
def download(directory: Path | None, repo: str, segmenter: str | None, revision: str, as_json: bool) -> None:
    """Download the official checkpoint to DIRECTORY: the files that build-engines needs, each checked by its hash.
    Or a segmenter, which makes masks.

    An interrupted download continues; files that are there already are only checked."""
    from scail2_rt.runtime.cli.progress import BuildLines
    from scail2_rt.runtime.jobs.download import HuggingFace
    from scail2_rt.runtime.jobs.download import download as run
    from scail2_rt.runtime.jobs.download_segmenter import download_segmenter

    if segmenter is not None:
        with stdout_for(as_json):
            found = download_segmenter(segmenter, HuggingFace(), directory, revision, BuildLines())
        show(found, found.text, as_json)
        return
    if directory is None:
        raise click.UsageError("name the folder for the checkpoint, or what to fetch with --segmenter")
    with stdout_for(as_json):
        report = run(directory, HuggingFace(), repo, revision, BuildLines())
    show(report, report.text, as_json)


@click.command(cls=SectionCommand)
@click.argument("path", type=PATH)
@reporting
def inspect(path: Path, as_json: bool) -> None:
    """Say what PATH is: a checkpoint (folder or file), one network of it, a LoRA or an engine folder.

    Layout, types, sizes and what is missing, from the headers alone; an engine folder is read whole and compared with
    its checksums."""
    from scail2_rt.runtime.cli.progress import BuildLines
    from scail2_rt.runtime.jobs.inspection import inspect as run

    with stdout_for(as_json):
        found = run(path, BuildLines())
    show(found, found.text, as_json)
