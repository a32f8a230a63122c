"""README and docs keep their word: commands parse, options exist, links resolve, Python compiles."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from scail2_rt import runtime
from scail2_rt.runtime.cli.main import cli

ROOT = Path(__file__).parents[1]
LOG = ROOT / "docs" / "log"  # tells of commands as they were
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").rglob("*.md") if LOG not in page.parents)]
FOREIGN = {
    "--cpu",
    "--cov",
    "--case",
    "--page",
    "--clips",
    "--frames",
    "--size",
    "--set",
    "--steps",
    "--work",
    "--from",
}
FOREIGN |= {"--extra-index-url", "--videos", "--device"}  # of pip and of scripts beside the command
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every scail2-rt command in blocks and in inline code; `…` stands for more."""
    lines = [line for _, text in blocks(page) for line in text.replace("\\\n", " ").split("\n")]
    lines += [re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", prose(page))]
    for line in lines:
        words = shlex.split(line.replace("\\|", "|"), comments=True) if "scail2-rt " in line else []
        if "scail2-rt" in words:
            words = words[words.index("scail2-rt") + 1 :]
            end = next((n for n, word in enumerate(words) if word in ("|", ">", "&&", "<")), len(words))
            yield words[:end]


def problems(words: list[str]) -> Iterator[str]:
    """What is wrong with a command: an unknown command, option or choice, or more arguments than it takes."""
    command: click.Command = cli
    context = click.Context(cli)
    rest = list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith(("-", "…")):
        found = command.get_command(context, rest[0])
        if found is None:
            yield f"there is no command {rest[0]!r}"
            return
        command, rest = found, rest[1:]
    options = {name: each for each in command.params for name in (*each.opts, *each.secondary_opts)}
    room = sum(99 if each.nargs < 0 else each.nargs for each in command.params if isinstance(each, click.Argument))
    while rest:
        word = rest.pop(0)
        if word.startswith("-") and word not in ("-", "--help", "-h", "--version", "--debug"):
            if word not in options:
                yield f"{command.name} has no option {word}"
                continue
            option = options[word]
            values = [] if getattr(option, "is_flag", False) else rest[: option.nargs]
            del rest[: len(values)]
            if isinstance(option.type, click.Choice):
                offered = {str(choice) for choice in option.type.choices}
                yield from (
                    f"{word} has no choice {each}"
                    for value in values
                    for each in value.split("|")
                    if each not in offered
                )
        elif not word.startswith("-") and word != "…":
            room -= 1
    if room < 0 and not isinstance(command, click.Group):
        yield f"{command.name} takes fewer arguments"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_exist(page: Path) -> None:
    assert [f"{' '.join(words)}: {said}" for words in commands(page) for said in problems(words)] == []


def test_a_wrong_command_is_found() -> None:
    wrong = ["generat e/", "generate e/ --sise 64x64", "generate e/ --mode both", "doctor a b", "masks made --case x"]
    assert all(list(problems(line.split())) for line in wrong)
    assert not list(problems(["generate", "e/", "--mode", "auto|replace", "--overwrite", "-o", "x.mp4", "…"]))


def test_the_pages_have_commands() -> None:
    assert sum(1 for page in PAGES for _ in commands(page)) > 60


def every_option(command: click.Command) -> Iterator[str]:
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from every_option(found)
    for each in command.params:
        yield from (*each.opts, *each.secondary_opts)


def test_options_in_the_text_exist() -> None:
    known = {*every_option(cli), *FOREIGN, "--help", "--version", "--debug"}
    for page in PAGES:
        named = {word for code in re.findall(r"`(--[^`]+)`", prose(page)) for word in code.split() if word[:2] == "--"}
        assert {re.split(r"[=|\\]", word)[0] for word in named} <= known, page


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.replace("`", "")).strip().lower() for heading in headings]
    return {re.sub(r"[ -]+", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", [*PAGES, *sorted(LOG.glob("*.md"))], ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target
    assert not re.search(r"^(<{7}|>{7}|={7}$)", page.read_text(), re.MULTILINE), "an unfinished merge"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_compiles(page: Path) -> None:
    for language, text in blocks(page):
        if language == "python":
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ImportFrom) and node.module == "scail2_rt.runtime":
                    assert {each.name for each in node.names} <= set(runtime.__all__)


def test_pages_are_short() -> None:
    lines = {page.name: page.read_text().count("\n") for page in PAGES}
    assert {name: count for name, count in lines.items() if count > 200} == {}
