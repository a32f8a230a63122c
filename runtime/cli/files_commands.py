"""The commands about files: `convert`, `download`, `inspect`. Only click is imported here, so that `--help` is fast."""

from pathlib import Path
from typing import Any

import click

from scail2_rt.runtime.cli.options import COMPONENT_OPTIONS, LORA_OPTIONS
from scail2_rt.runtime.cli.output import separate_parts, show, stdout_for
from scail2_rt.runtime.cli.sections import PATH, SectionCommand, in_section, option, reporting

DTYPES = ("bf16", "fp16", "fp32")  # engines.build.convert_target.DTYPES
REPOSITORY = "zai-org/SCAIL-2"  # runtime.jobs.download.REPOSITORY

CONVERT_OPTIONS = in_section(
    "Convert",
    option("-o", "--output", type=PATH, required=True, metavar="FILE.safetensors", help="The file to write."),
    option(
        "--dtype",
        type=click.Choice(DTYPES),
        help="Type of the transformer's matrices. Norms, modulation, time embedding and head stay fp32.  [default: "
        "16-bit matrices keep their type, others become bf16]",
    ),
    option(
        "--all",
        "everything",
        is_flag=True,
        help="Also write VAE, umT5, CLIP and tokenizer to the same folder, which is then a complete checkpoint.",
    ),
    *LORA_OPTIONS,
    option("--overwrite", is_flag=True, help="Replace an existing output, or an unfinished output of another input."),
)
DOWNLOAD_OPTIONS = in_section(
    "Download",
    option("--repo", default=REPOSITORY, show_default=True, metavar="NAME", help="Repository on the Hugging Face hub."),
    option(
        "--segmenter",
        type=click.Choice(["sam2", "sam3"]),
        help="Download a segmenter, which makes masks, instead of the checkpoint: SAM 2.1 with Grounding DINO, or "
        "SAM 3 (its owner must grant access). It is written to DIRECTORY or, by default, to the cache folder, where "
        "`generate` and `masks make` find it.",
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

    The memory needed does not depend on the size of the checkpoint. To continue an interrupted conversion, run the
    same command again."""
    from scail2_rt.engines.build.convert import convert as run
    from scail2_rt.engines.build.convert_target import ConvertRequest
    from scail2_rt.export.checkpoint.lora import parse_lora
    from scail2_rt.export.checkpoint.open import COMPONENTS, open_checkpoint
    from scail2_rt.runtime.cli.progress import BuildLines

    parts = separate_parts(options)
    everything = options["everything"]
    if parts and not everything:
        raise click.UsageError(
            "--vae, --t5, --clip and --tokenizer were given without --all, but then only the transformer is read. Add "
            "--all."
        )
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
    """Download the official checkpoint to DIRECTORY, or a segmenter, which makes masks.

    Only the needed files are fetched, and each is checked by its hash. Existing files are checked and kept. To continue
    an interrupted download, run the same command again."""
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
        raise click.UsageError("No folder was given. Give a folder for the checkpoint, or use --segmenter.")
    with stdout_for(as_json):
        report = run(directory, HuggingFace(), repo, revision, BuildLines())
    show(report, report.text, as_json)


@click.command(cls=SectionCommand)
@click.argument("path", type=PATH)
@reporting
def inspect(path: Path, as_json: bool) -> None:
    """Identify PATH: a checkpoint (folder or file), one network of it, a LoRA or an engine folder.

    Prints layout, types, sizes and missing parts. Only headers of weights files are read. All files of an engine folder
    are read and compared with its checksums."""
    from scail2_rt.runtime.cli.progress import BuildLines
    from scail2_rt.runtime.jobs.inspection import inspect as run

    with stdout_for(as_json):
        found = run(path, BuildLines())
    show(found, found.text, as_json)
