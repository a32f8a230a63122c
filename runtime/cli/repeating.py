"""`generate --from-video`: stored settings take the place of the options that the command line does not give,
and of those in a `--config` file that say what is made."""

from typing import Any

import click
from click.core import ParameterSource

from scail2_rt.kernels.errors import InputError


def repeated(options: dict[str, Any], remote: bool) -> dict[str, Any]:
    """The parameters of the running command, completed with the settings of the video `from_video`; for a `remote`
    service without those of engines."""
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
            f"The settings in {video} are damaged ({error}): give the run report, or the options themselves."
        ) from error
