"""How the commands declare their options: in sections, which `--help` shows as headings in the order of declaration.

`option` makes an option's factory, `in_section` applies some of them under one heading; `reporting` adds `--json` and
`--debug`, which the error handler in `cli.py` looks for. Only click is imported here, so that `--help` answers at once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class SectionOption(click.Option):
    """An option that `--help` lists under the heading `section`."""

    def __init__(self, *args: Any, section: str = "Options", **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.section = section


class SectionCommand(click.Command):
    """A command whose help lists its options by section, in the order in which the sections first occur."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections.setdefault(getattr(parameter, "section", "Other"), []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records)


PATH = click.Path(path_type=Path)


def in_section(section: str, *options: Callable[..., Decorator]) -> Decorator:
    """Apply option factories, each called with the section's name, so that they are listed in the order given."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for make in reversed(options):
            function = make(section)(function)
        return function

    return decorate


def option(*names: str, **attributes: Any) -> Callable[[str], Decorator]:
    """An option factory for `in_section`."""
    return lambda section: click.option(*names, cls=SectionOption, section=section, **attributes)


def _remember(ctx: click.Context, parameter: click.Parameter, value: bool) -> bool:
    """Flags that the error handler needs even when the command never runs: it finds them in the root's `obj`."""
    if value and isinstance(ctx.obj, dict):
        ctx.obj[parameter.name] = True
    return value


def debug_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--debug`, accepted before and after the command's name."""
    return click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_remember,
        cls=SectionOption,
        section="Other",
        help="Show the traceback of an error.",
    )(function)


def reporting(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--json` and `--debug`, which every command that reports has."""
    json_option = click.option(
        "--json",
        "as_json",
        is_flag=True,
        is_eager=True,
        callback=_remember,
        cls=SectionOption,
        section="Other",
        help="Print one JSON object on stdout and nothing else there.",
    )
    return json_option(debug_option(function))
