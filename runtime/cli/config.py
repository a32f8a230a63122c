"""`--config FILE.toml`: options of a command, read from a configuration file.

Names at the top of the file apply to every command that has the option. A table applies to one command: `[generate]`,
`[build-engines]`, `[serve]`, `[bench]`, `[masks.make]`. A name is the option's long name (`vram-limit` or `vram_limit`)
or the name of an argument (`engines`). Relative paths start at the file's folder. The command line overrides the table,
and the table overrides the top of the file. In `bench` the option is called `--config-file`, because `--config` selects
a model there. Only click is imported here, so that `--help` is fast.
"""

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from scail2_rt.runtime.cli.sections import PATH, SectionOption, path_words
from scail2_rt.runtime.cli.types import SeedList

ENVIRONMENT = "SCAIL2_RT_CONFIG"
COMMANDS = ("generate", "build-engines", "serve", "bench", "masks make")  # tables of the file


def config_option(function: Callable[..., Any], *names: str) -> Callable[..., Any]:
    """Add `--config` (or the option `names`) to a command. It must be the first option, so that its values are known
    when the other options are processed."""
    return click.option(
        *(names or ("--config",)),
        "config_file",
        type=PATH,
        metavar="FILE.toml",
        is_eager=True,
        expose_value=False,
        callback=_read,
        envvar=ENVIRONMENT,
        show_envvar=True,
        cls=SectionOption,
        section="Other",
        help="Read options from this file. The command line overrides it.",
    )(function)


def config_file() -> Path | None:
    """Return the configuration file of the current command, or None."""
    found = click.get_current_context().meta.get(ENVIRONMENT)
    assert found is None or isinstance(found, Path)
    return found


def _read(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    if path is None or ctx.resilient_parsing:  # set during shell completion
        return
    file = Path(os.path.abspath(path.expanduser()))
    document = _named_once(file, _load(file, ctx.get_parameter_source(parameter.name or "")))
    here, tables = _command_name(ctx), _tables(ctx)
    _refuse_unknown(file, document, tables)
    top = {name: value for name, value in document.items() if name not in _groups(tables)}
    known = parameters(ctx.command)
    chosen = {name: value for name, value in top.items() if name in known}
    chosen |= _named_once(file, _table(document, here))
    values = {}
    try:
        for name, value in chosen.items():
            values[str(known[name].name)] = value_of(ctx, known[name], name, value, file.parent)
    except click.UsageError as error:
        raise click.UsageError(f"{file}: {error.message}") from error
    ctx.default_map = values
    ctx.meta[ENVIRONMENT] = file
    if isinstance(ctx.obj, dict):
        ctx.obj["config"] = file  # for the error handler


def _load(file: Path, source: ParameterSource | None) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib  # type: ignore[import-not-found, no-redef]
    try:
        with file.open("rb") as opened:
            return tomllib.load(opened)
    except OSError as error:
        named = f", which {ENVIRONMENT} names," if source is ParameterSource.ENVIRONMENT else ""
        raise click.UsageError(
            f"The configuration file {file}{named} cannot be read ({error.strerror}). Give a file that exists."
        ) from error
    except ValueError as error:
        raise click.UsageError(f"{file} is not a valid TOML file: {error}. Correct it.") from error


def _named_once(file: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by names with dashes. Raises UsageError for a name given both with a dash and an underscore."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if dashed(name) in found:
            raise click.UsageError(
                f"{file} gives {dashed(name)} twice, also as {dashed(name).replace('-', '_')}. Leave out one of them."
            )
        found[dashed(name)] = value
    return found


def dashed(name: str) -> str:
    """Return an option's name as in the command line: `vram_limit` → `vram-limit`."""
    return name.replace("_", "-")


def _command_name(ctx: click.Context) -> str:
    """Return the table of the current command: "generate", "masks make"; "bench" for all sections of `bench`."""
    words = []
    while ctx.parent is not None:
        words.append(ctx.info_name or "")
        ctx = ctx.parent
    name = " ".join(reversed(words))
    return next(known for known in COMMANDS if name == known or name.startswith(f"{known} "))


def _tables(ctx: click.Context) -> dict[str, dict[str, click.Parameter]]:
    """Return table → its names and their parameters. All sections of `bench` have the same."""
    root = ctx.find_root().command
    found = {}
    for name in COMMANDS:
        command: click.Command | None = root
        for word in (*name.split(), *(["all"] if name == "bench" else [])):
            assert isinstance(command, click.Group)
            command = command.get_command(ctx, word)
        assert command is not None
        found[name] = parameters(command)
    return found


def parameters(command: click.Command) -> dict[str, click.Parameter]:
    """Return the names that a configuration or batch file may use → parameters of the command."""
    found: dict[str, click.Parameter] = {}
    for parameter in command.params:
        if parameter.is_eager and parameter.name != "server":  # --config, --json, --debug: only on the command line
            continue
        names = [name for name in parameter.opts if name.startswith("--")] or [parameter.name or ""]
        found |= {dashed(name.removeprefix("--")): parameter for name in names}
    return found


def _groups(tables: Iterable[str]) -> set[str]:
    """Return the names at the top of a file that must be tables."""
    return {name.split()[0] for name in tables}


def _table(document: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Return the table of a command, or an empty one."""
    found: Any = document
    for word in command.split():
        found = found.get(word, {})
    assert isinstance(found, dict)
    return found


def _refuse_unknown(file: Path, document: Mapping[str, Any], tables: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UsageError for an unknown name, with the closest known one, and for a value in place of a table."""
    groups = _groups(tables)
    anywhere = {name for names in tables.values() for name in names}
    for name, value in document.items():
        if name not in groups:
            if isinstance(value, dict):
                _refuse(file, name, groups, "table of a command")
            if name not in anywhere:
                _refuse(file, name, anywhere, "option")
        elif not isinstance(value, dict):
            raise click.UsageError(f"{file}: {name} must be a table. Write [{name}] and its options below it.")
    for word, inner in document.get("masks", {}).items():
        if word != "make" or not isinstance(inner, dict):
            raise click.UsageError(
                f"{file}: [masks] holds {word!r}. Put the options of `masks make` into [masks.make]."
            )
    for command, names in tables.items():
        for name in _table(document, command):
            if dashed(name) not in names:
                _refuse(file, name, names, f"option of `{command}`")


def _refuse(file: Path, name: str, known: Iterable[str], what: str) -> None:
    close = difflib.get_close_matches(dashed(name), list(known), 1, 0.6)
    hint = f"Use {close[0]}." if close else "See --help for the names."
    raise click.UsageError(f"{file}: {name} is not {'an' if what[0] == 'o' else 'a'} {what}. {hint}")


def value_of(ctx: click.Context, parameter: click.Parameter, name: str, value: Any, folder: Path) -> Any:
    """Return a value of a TOML or JSON file in the form of the command line, with relative paths joined to `folder`.
    Raises UsageError, which begins with `name`, for an invalid value."""
    if getattr(parameter, "is_flag", False):
        if not isinstance(value, bool):
            raise click.UsageError(f"{name} is {_toml(value)}. Give true or false.")
        return value
    if isinstance(parameter.type, SeedList) and isinstance(value, list):
        value = ",".join(map(str, value))
    if parameter.multiple and not isinstance(value, list):
        value = [value]
    if parameter.multiple and parameter.nargs > 1 and value and not isinstance(value[0], list):
        value = [value]
    given = _texts(parameter, value, folder)
    if not _is_nested(given, parameter.multiple + (parameter.nargs > 1)):
        wanted = "a list of texts or numbers" if parameter.multiple else "a text or a number"
        raise click.UsageError(f"{name} is {_toml(value)}. Give {wanted}.")
    try:
        parameter.type_cast_value(ctx, given)
    except click.BadParameter as error:
        raise click.UsageError(f"{name}: {error.message}") from error
    return given


def _is_nested(given: Any, depth: int) -> bool:
    """Whether this is a text (depth 0), a list of texts (1) or a list of such lists (2)."""
    if not depth:
        return isinstance(given, str)
    return isinstance(given, list) and all(_is_nested(item, depth - 1) for item in given)


def _toml(value: Any) -> str:
    """A value as the file writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str | int | float | list | dict) else str(value)


def _texts(parameter: click.Parameter, value: Any, folder: Path) -> Any:
    """Return values as texts, with relative paths joined to the folder; None for a type that no option has."""
    if isinstance(value, list):
        texts = [_texts(parameter, item, folder) for item in value]
        return None if None in texts else texts
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    text = str(value)
    words = path_words(parameter)
    if not words or text in words or "://" in text:
        return text
    return str(folder / Path(text).expanduser())
