"""`generate --from-video`: stored settings replace options that are not given on the command line, and the inputs and
stored options of a `--config` file."""

from typing import Any

import click
from click.core import ParameterSource

from scail2_rt.kernels.errors import InputError


def repeated(options: dict[str, Any], remote: bool) -> dict[str, Any]:
    """Return the parameters of the current command, completed with the settings of the video `from_video`. remote: a
    service makes the video, so settings of engines are left out.

    Raises InputError as `repeated_options`, and for settings with invalid values."""
    from scail2_rt.runtime.jobs.options import GenerateOptions
    from scail2_rt.runtime.jobs.repeat import DESCRIBED, repeated_options

    ctx, video = click.get_current_context(), options["from_video"]
    given = {n: v for n, v in options.items() if ctx.get_parameter_source(n) is ParameterSource.COMMANDLINE}
    known = GenerateOptions.__dataclass_fields__
    options |= {name: known[name].default for name in DESCRIBED if name not in given}  # those of a --config file
    parameters = {p.name: p for p in ctx.command.params if p.name in options}
    stored = repeated_options(video, options["output"], given, remote)
    try:
        return options | {name: parameters[name].type_cast_value(ctx, value) for name, value in stored.items()}
    except (click.UsageError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"The settings in {video} are damaged ({error}). Give the run report, or give the options."
        ) from error
