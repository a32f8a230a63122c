"""Declaration of options in sections, which `--help` shows as headings in the order of declaration.

`option` makes the factory of an option, and `in_section` applies factories under one heading. `reporting` adds `--json`
and `--debug`, which the error handler in `main.py` reads. Only click is imported here, so that `--help` is fast.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class SectionOption(click.Option):
    """An option that `--help` lists under the heading `section`."""

    def __init__(self, *args: Any, section: str = "Options", **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.section = section

    def shell_complete(self, ctx: click.Context, incomplete: str) -> "list[CompletionItem]":
        """Complete the values of the type, or paths if the option accepts one (`PATH[:STRENGTH]`, `random|DIR`)."""
        from click.shell_completion import CompletionItem

        words = path_words(self)
        if not words:
            return super().shell_complete(ctx, incomplete)
        fixed = [word for word in words if incomplete and word.islower() and word.startswith(incomplete)]
        if fixed:
            return [CompletionItem(word) for word in fixed]
        return [CompletionItem(incomplete, type="dir" if words == ["DIR"] else "file")]


class SectionCommand(click.Command):
    """A command whose help lists options by section. Sections are in the order of their first options, `Other` last."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections.setdefault(getattr(parameter, "section", OTHER), []).append(record)
        for section, records in sorted(sections.items(), key=lambda item: item[0] == OTHER):
            with formatter.section(section):
                formatter.write_dl(records)


PATH = click.Path(path_type=Path)
OTHER = "Other"  # section of the options that every command has


def path_words(parameter: click.Parameter) -> list[str]:
    """Return the words of a parameter's metavar ("random", "DIR") if it accepts paths, else an empty list."""
    words = re.findall(r"\w+", parameter.metavar or "")
    inner = getattr(parameter.type, "types", [parameter.type])
    named = any(isinstance(kind, click.Path) for kind in inner) or {"PATH", "DIR", "FILE", "ENGINES"} & set(words)
    return (words or ["PATH"]) if named else []


def in_section(section: str, *options: Callable[..., Decorator]) -> Decorator:
    """Return a decorator that adds options to a command under one heading, in the order given."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for make in reversed(options):
            function = make(section)(function)
        return function

    return decorate


def option(*names: str, **attributes: Any) -> Callable[[str], Decorator]:
    """Return an option factory for `in_section`."""
    return lambda section: click.option(*names, cls=SectionOption, section=section, **attributes)


def _remember(ctx: click.Context, parameter: click.Parameter, value: bool) -> bool:
    """Store a flag in the root's `obj`, where the error handler finds it even if the command does not run."""
    if value and isinstance(ctx.obj, dict):
        ctx.obj[parameter.name] = True
    return value


def debug_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--debug`, which is accepted before and after the command's name."""
    return click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_remember,
        cls=SectionOption,
        section=OTHER,
        help="Show the traceback of an error.",
    )(function)


def reporting(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--json` and `--debug`."""
    json_option = click.option(
        "--json",
        "as_json",
        is_flag=True,
        is_eager=True,
        callback=_remember,
        cls=SectionOption,
        section=OTHER,
        help="Print one JSON object on stdout and nothing else.",
    )
    return json_option(debug_option(function))
