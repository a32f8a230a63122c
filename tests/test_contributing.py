"""CONTRIBUTING.md, SECURITY.md and the READMEs of examples name files and code that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACEHOLDERS = ("NAME", "FOLDER", ".venv", "out/")  # names that a reader chooses, and what is made
FLOORS = ("kernels", "export", "engines", "runtime", "benchmarks", "tests")


def spoken_of(page: str) -> list[str]:
    """What stands between backquotes, outside of blocks of code."""
    text = re.sub(r"^ *```.*?^ *```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    return [words for words in re.findall(r"`([^`]+)`", text) if not any(name in words for name in PLACEHOLDERS)]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md", "examples/README.md", "CHANGELOG.md"])
def test_linked_pages_exist(page: str) -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", (ROOT / page).read_text())
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_the_guide_names_files_that_exist() -> None:
    paths = {words for words in spoken_of("CONTRIBUTING.md") if re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?", words)}
    assert len(paths) > 20
    assert sorted(path for path in paths if not list(ROOT.glob(path)) and not list(ROOT.glob(f"*/{path}"))) == []
    files = {words for words in spoken_of("CONTRIBUTING.md") if re.fullmatch(r"\w+\.py", words)}
    assert sorted(file for file in files if not any(list((ROOT / floor).rglob(file)) for floor in FLOORS)) == []


def test_the_guide_names_code_that_exists() -> None:
    code = "\n".join(path.read_text() for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
    names = {words for words in spoken_of("CONTRIBUTING.md") if re.fullmatch(r"_?[A-Za-z]+_[\w]+", words)}
    names |= {
        name
        for words in spoken_of("CONTRIBUTING.md")
        if re.fullmatch(r"[A-Z]\w+(\.\w+)?", words)
        for name in words.split(".")
    }
    assert len(names) > 30
    assert sorted(name for name in names if not re.search(rf"\b{re.escape(name)}\b", code)) == []
