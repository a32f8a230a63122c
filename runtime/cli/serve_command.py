"""The command `serve`. Only click is imported here, so that `--help` is fast."""

import re
from pathlib import Path
from typing import Any

import click

from scail2_rt.runtime.cli.config import config_option
from scail2_rt.runtime.cli.options import BACKEND, NO_GRAPHS, SELF_ATTENTION, VRAM_LIMIT
from scail2_rt.runtime.cli.sections import PATH, SectionCommand, debug_option, in_section, option
from scail2_rt.runtime.cli.segmenter_options import SEGMENTERS
from scail2_rt.runtime.cli.types import MemorySize


class Duration(click.ParamType):
    """`7d`, `12h`, `30m`, `90s` → seconds."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float | int):
            return float(value)
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", value.strip())
        if not match:
            self.fail(f"{value!r} is not a time. Write it as in 7d, 12h or 30m.", param, ctx)
        return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[match[2]]


SERVE_OPTIONS = (
    in_section(
        "Address and data",
        option(
            "--host",
            default="127.0.0.1",
            metavar="ADDRESS",
            show_default=True,
            help="Address to listen on. If other machines can reach it, --api-key-file is needed.",
        ),
        option(
            "--port",
            type=int,
            default=8000,
            show_default=True,
            metavar="N",
            help="Port to listen on; 0 chooses a free one.",
        ),
        option(
            "--data",
            metavar="DIR|URL",
            help="Folder for jobs, files and the database. With --ray, a folder that all nodes share, or a URL such as "
            "s3://BUCKET/FOLDER.  [default: ~/.local/share/scail2-rt/serve]",
        ),
        option(
            "--ray",
            "ray_address",
            metavar="ADDRESS",
            help="Deploy the service on the Ray cluster at this address: HOST:PORT, or auto on one of its nodes.",
        ),
        option("--gpus", default="all", show_default=True, metavar="N|all", help="GPUs to use, one worker per GPU."),
        option(
            "--gpus-per-video",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            metavar="N",
            help="GPUs that share one video.",
        ),
    ),
    in_section(
        "Access",
        option(
            "--api-key-file",
            "key_file",
            type=PATH,
            metavar="FILE",
            help="File of API keys, one per line. Each client sees only its own jobs and files.",
        ),
        option(
            "--allow-host",
            "allow_hosts",
            multiple=True,
            metavar="NAME",
            help="Host name that clients may use in addition to --host; may be repeated.",
        ),
        option(
            "--allow-fetch",
            "fetch_hosts",
            multiple=True,
            metavar="HOST",
            help="Host from which inputs may be fetched by URL, as in files.example.com or *.example.com; may be "
            "repeated.  [default: none]",
        ),
    ),
    in_section(
        "Limits",
        option("--keep", "keep_s", type=Duration(), default="7d", show_default=True, help="How long results are kept."),
        option(
            "--disk-limit",
            "disk_bytes",
            type=MemorySize(),
            metavar="SIZE",
            help="Maximum disk space of the data folder. The oldest results are deleted first.  [default: no limit]",
        ),
        option(
            "--max-upload",
            type=MemorySize(),
            default="1GiB",
            show_default=True,
            metavar="SIZE",
            help="Maximum size of one request.",
        ),
        option(
            "--max-frames",
            type=click.IntRange(min=1),
            default=3000,
            show_default=True,
            metavar="N",
            help="Maximum number of frames per video.",
        ),
        option(
            "--max-queue",
            type=click.IntRange(min=1),
            default=2000,
            show_default=True,
            metavar="N",
            help="Maximum number of queued and running jobs.",
        ),
        option(
            "--max-queue-per-key",
            type=click.IntRange(min=1),
            default=500,
            show_default=True,
            metavar="N",
            help="Maximum number of queued and running jobs per client.",
        ),
        option(
            "--file-quota",
            type=MemorySize(),
            default="20GiB",
            show_default=True,
            metavar="SIZE",
            help="Maximum disk space for the files of one client.",
        ),
    ),
    in_section(
        "Engines",
        option("--model", default="scail-2", show_default=True, metavar="NAME", help="Name of the model in the API."),
        BACKEND,
        option(
            "--max-rows",
            type=click.IntRange(min=1),
            default=16384,
            show_default=True,
            metavar="N",
            help="Maximum number of rows (tokens) per call of a stage.",
        ),
        SELF_ATTENTION,
        VRAM_LIMIT,
        NO_GRAPHS,
        option(
            "--segmenter",
            type=click.Choice(SEGMENTERS),
            default="auto",
            show_default=True,
            help="Segmenter for requests without masks.",
        ),
        option("--segmenter-weights", type=PATH, metavar="DIR", help="Folder of a segmenter."),
        option("--no-warm", is_flag=True, help="Load the weights at the first job instead of at the start."),
    ),
)


def serve_options(function: Any) -> Any:
    """Add all options of `serve` to a command."""
    for section in reversed(SERVE_OPTIONS):
        function = section(function)
    return function


@click.command(cls=SectionCommand)
@config_option
@click.argument("engines", type=click.Path())
@serve_options
@debug_option
def serve(engines: str, ray_address: str | None, **options: Any) -> None:
    """Serve videos over HTTP: the API of OpenAI's videos, a page at /, and `scail2-rt generate --server`.

    Jobs are stored in --data: an accepted job survives a crash of the worker, server or machine. The address is printed
    on stdout when the service is ready. With --ray the service runs in the cluster, and the command exits."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise click.UsageError(
            f"serve needs the package {error.name}. Install it with: pip install 'scail2-rt[serve]'"
        ) from error
    from scail2_rt.runtime.serve.launch import settings_of
    from scail2_rt.runtime.serve.server import run

    if ray_address is not None:
        from scail2_rt.runtime.cluster.deploy import deploy

        click.echo(deploy(engines, options, ray_address))
        return
    run(settings_of(Path(engines), options))
