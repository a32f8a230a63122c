"""`scail2-rt comfyui`: the nodes in a ComfyUI folder. Only click is imported here, so that `--help` is fast."""

import importlib
from pathlib import Path

import click

from scail2_rt.runtime.cli.output import show, stdout_for
from scail2_rt.runtime.cli.sections import PATH, SectionCommand, in_section, option, reporting

SHIPPED = "scail2_rt.benchmarks.sprites.shipped"  # in a higher layer, imported when needed
PYTHON_OPTION = option(
    "--python",
    type=PATH,
    metavar="FILE",
    help="The Python that runs ComfyUI.  [default: the one found beside it]",
)


@click.group()
def comfyui() -> None:
    """Install the nodes into ComfyUI, check them, or remove them."""


@comfyui.command(cls=SectionCommand)
@click.argument("folder", type=PATH)
@in_section(
    "Install",
    PYTHON_OPTION,
    option("--sprites", is_flag=True, help="Also build the engines of the small model, for the example workflows."),
)
@reporting
def install(folder: Path, python: Path | None, sprites: bool, as_json: bool) -> None:
    """Install the nodes and the example workflows into the ComfyUI in FOLDER.

    The packages of ComfyUI's Python are not changed. If packages are missing, the commands that install them are
    printed. If packages are too old, they are listed and nothing is installed."""
    from scail2_rt.runtime.cli.progress import BuildLines
    from scail2_rt.runtime.comfyui.installing import NAME
    from scail2_rt.runtime.comfyui.installing import install as run

    with stdout_for(as_json):
        installed = run(folder, python)
        if sprites:
            shipped = importlib.import_module(SHIPPED)
            folder = installed.found.folder / "models" / NAME / "sprites"
            shipped.make_engines(shipped.shipped_checkpoint(), folder, observer=BuildLines())
    show(installed, installed.text, as_json)


@comfyui.command(cls=SectionCommand)
@click.argument("folder", type=PATH)
@in_section("Check", PYTHON_OPTION)
@reporting
def check(folder: Path, python: Path | None, as_json: bool) -> None:
    """Show the state of the ComfyUI in FOLDER.

    Prints version, Python, nodes, missing packages, engines and checkpoints."""
    from scail2_rt.runtime.comfyui.installing import look

    found = look(folder, python)
    show(found, found.text, as_json)


@comfyui.command(cls=SectionCommand)
@click.argument("folder", type=PATH)
@reporting
def remove(folder: Path, as_json: bool) -> None:
    """Remove the nodes and the example pictures from the ComfyUI in FOLDER. Engines and results are kept."""
    from scail2_rt.runtime.comfyui.installing import remove as run

    removed = run(folder)
    show(removed, removed.text, as_json)
