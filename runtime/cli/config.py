"""`--config FILE.toml`: options of a command, read from a file.

Names at the top of the file are for every command that has such an option; a table is for one command: `[generate]`,
`[build-engines]`, `[serve]`, `[bench]`, `[masks.make]`. A name is the option's long name (`vram-limit` or `vram_limit`)
or that of an argument (`engines`). Relative paths start at the file's folder. The command line wins over the table of
the command, and this over the top of the file. `bench` calls the option `--config-file`: its `--config` names a model.
Only click is imported here, so that `--help` answers at once.
"""

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from scail2_rt.runtime.cli.sections import PATH, SectionOption, path_words

ENVIRONMENT = "SCAIL2_RT_CONFIG"
COMMANDS = ("generate", "build-engines", "serve", "bench", "masks make")  # tables of the file


def config_option(function: Callable[..., Any], *names: str) -> Callable[..., Any]:
    """`--config`, or another name. It must be the first option of its command, so that its values are there for all
    others."""
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
        help="Read options from this file; the command line wins over it.",
    )(function)


def config_file() -> Path | None:
    """The file whose options the current command uses, if any."""
    found = click.get_current_context().meta.get(ENVIRONMENT)
    assert found is None or isinstance(found, Path)
    return found


def _read(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    if path is None or ctx.resilient_parsing:  # which completion is
        return
    file = Path(os.path.abspath(path.expanduser()))
    document = _named_once(file, _load(file, ctx.get_parameter_source(parameter.name or "")))
    here, tables = _command_name(ctx), _tables(ctx)
    _refuse_unknown(file, document, tables)
    top = {name: value for name, value in document.items() if name not in _groups(tables)}
    known = _parameters(ctx.command)
    chosen = {name: value for name, value in top.items() if name in known}
    chosen |= _named_once(file, _table(document, here))
    ctx.default_map = {
        str(known[name].name): _value(ctx, known[name], name, value, file) for name, value in chosen.items()
    }
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
        raise click.UsageError(f"The configuration file {file}{named} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise click.UsageError(f"{file} is not a TOML file: {error}.") from error


def _named_once(file: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by names with dashes. Raises UsageError for a name that is there with a dash and with an underscore."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if _dashed(name) in found:
            raise click.UsageError(f"{file} gives {_dashed(name)} twice, also as {_dashed(name).replace('-', '_')}.")
        found[_dashed(name)] = value
    return found


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _command_name(ctx: click.Context) -> str:
    """ "generate", "masks make"; every section of `bench` is "bench"."""
    words = []
    while ctx.parent is not None:
        words.append(ctx.info_name or "")
        ctx = ctx.parent
    name = " ".join(reversed(words))
    return next(known for known in COMMANDS if name == known or name.startswith(f"{known} "))


def _tables(ctx: click.Context) -> dict[str, dict[str, click.Parameter]]:
    """Table → its names with their parameters; of `bench` those of a section, which are equal in all."""
    root = ctx.find_root().command
    found = {}
    for name in COMMANDS:
        command: click.Command | None = root
        for word in (*name.split(), *(["all"] if name == "bench" else [])):
            assert isinstance(command, click.Group)
            command = command.get_command(ctx, word)
        assert command is not None
        found[name] = _parameters(command)
    return found


def _parameters(command: click.Command) -> dict[str, click.Parameter]:
    """The names that a file may use for the parameters of a command."""
    found: dict[str, click.Parameter] = {}
    for parameter in command.params:
        if parameter.is_eager and parameter.name != "server":  # --config, --json and --debug are for one call
            continue
        names = [name for name in parameter.opts if name.startswith("--")] or [parameter.name or ""]
        found |= {_dashed(name.removeprefix("--")): parameter for name in names}
    return found


def _groups(tables: Iterable[str]) -> set[str]:
    """Names at the top of a file that are tables."""
    return {name.split()[0] for name in tables}


def _table(document: Mapping[str, Any], command: str) -> dict[str, Any]:
    """The table of a command; empty when the file has none."""
    found: Any = document
    for word in command.split():
        found = found.get(word, {})
    assert isinstance(found, dict)
    return found


def _refuse_unknown(file: Path, document: Mapping[str, Any], tables: Mapping[str, Mapping[str, Any]]) -> None:
    """UsageError for a name that is no option, with the closest one that is, and for what should be a table."""
    groups = _groups(tables)
    anywhere = {name for names in tables.values() for name in names}
    for name, value in document.items():
        if name not in groups:
            if isinstance(value, dict):
                _refuse(file, name, groups, "command with options here")
            if name not in anywhere:
                _refuse(file, name, anywhere, "option")
        elif not isinstance(value, dict):
            raise click.UsageError(f"{file}: {name} is a table: write [{name}] and its options below.")
    for word, inner in document.get("masks", {}).items():
        if word != "make" or not isinstance(inner, dict):
            raise click.UsageError(f"{file}: the options of `masks make` belong in [masks.make], not {word!r}.")
    for command, names in tables.items():
        for name in _table(document, command):
            if _dashed(name) not in names:
                _refuse(file, name, names, f"option of `{command}`")


def _refuse(file: Path, name: str, known: Iterable[str], what: str) -> None:
    close = difflib.get_close_matches(_dashed(name), list(known), 1, 0.6)
    hint = f"did you mean {close[0]}?" if close else "see --help for the names."
    raise click.UsageError(f"{file}: {name} is no {what}; {hint}")


def _value(ctx: click.Context, parameter: click.Parameter, name: str, value: Any, file: Path) -> Any:
    """A value of the file as the command line would give it; UsageError names the file when it does not fit."""
    wants = "a list of texts or numbers" if parameter.multiple else "a text or a number"
    if getattr(parameter, "is_flag", False):
        if not isinstance(value, bool):
            raise click.UsageError(f"{file}: {name} must be true or false, not {_toml(value)}.")
        return value
    if parameter.multiple and not isinstance(value, list):
        value = [value]
    if parameter.multiple and parameter.nargs > 1 and value and not isinstance(value[0], list):
        value = [value]
    given = _texts(parameter, value, file.parent)
    if not _is_nested(given, parameter.multiple + (parameter.nargs > 1)):
        raise click.UsageError(f"{file}: {name} must be {wants}, not {_toml(value)}.")
    try:
        parameter.type_cast_value(ctx, given)
    except click.BadParameter as error:
        raise click.UsageError(f"{file}: {name}: {error.message}") from error
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
    """Values as texts, relative paths joined to the folder; None for what an option cannot be."""
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
