"""`generate --from-video`: stored settings replace options that are not given on the command line."""

from typing import Any

import click
from click.core import ParameterSource

from scail2_rt.kernels.errors import InputError


def repeated(options: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of the current command, completed with the settings of the video `from_video`.

    Raises InputError as `repeated_options`, and for settings with invalid values."""
    from scail2_rt.runtime.jobs.repeat import repeated_options

    ctx, video = click.get_current_context(), options["from_video"]
    given = {n: v for n, v in options.items() if ctx.get_parameter_source(n) is ParameterSource.COMMANDLINE}
    parameters = {p.name: p for p in ctx.command.params if p.name in options}
    stored = repeated_options(video, given)
    try:
        return options | {name: parameters[name].type_cast_value(ctx, value) for name, value in stored.items()}
    except (click.UsageError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"The settings in {video} are damaged ({error}). Give the run report, or give the options."
        ) from error
