"""What mkdocs calls while it builds the site: it finds the packages, shows field lists of docstrings as tables, and
formats inline code.

The packages of `scail2_rt` are the top-level folders of the repository. mkdocstrings reads every module below its
search path, so it gets a folder with links to these packages alone: `.typecheck` would lead it through the virtual
environment as well, which takes a minute.
"""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.plugins import event_priority

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "export", "engines", "runtime")
CODE_IN_ROW = re.compile(r"(?<=[ |])`[^`\n]*\\\|[^`\n]*`")
SHORT_CODE = re.compile(r"<code>([^<]{1,32})</code>")
ROW = re.compile(r"^(\S[^\n]*?) {2,}(\S.*)$", re.MULTILINE)


@event_priority(100)  # before mkdocstrings reads its options
def on_config(config: Any) -> Any:
    """Link the packages into `build/api` and register the extension below with mkdocstrings."""
    links = ROOT / "build" / "api" / "scail2_rt"
    links.mkdir(parents=True, exist_ok=True)
    for name in PACKAGES:
        if not (links / name).exists():
            (links / name).symlink_to(ROOT / name, target_is_directory=True)
    handler = config.plugins["mkdocstrings"].config.handlers["python"]
    handler["paths"] = [str(links.parent)]
    handler["options"]["extensions"] = [__file__]
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Remove the backslash of `a\\|b` in tables: GitHub needs it there, and Python-Markdown would show it."""
    return CODE_IN_ROW.sub(lambda found: found[0].replace("\\|", "|"), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Mark short inline code, which `style.css` keeps on one line: a break after the hyphens of `--option` misleads."""
    return SHORT_CODE.sub(r'<code class="short">\1</code>', html)


class Tables(griffe.Extension):
    """Turn the two-column field lists of docstrings ("name   what it is") into Markdown tables."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = "\n\n".join(table(block) for block in obj.docstring.value.split("\n\n"))


def table(block: str) -> str:
    """A block of two columns as a Markdown table; any other block unchanged."""
    rows: list[list[str]] = []
    first = ROW.search(block)
    column = first.start(2) - first.start() if first else 0
    for line in block.split("\n"):
        found = ROW.match(line)
        if found:
            rows.append([found[1], found[2]])
        elif rows and line.startswith("    "):
            rows[-1][1] += f" {line.strip()}"
        elif first and line[column - 1 : column] == " ":  # names that fill their column
            rows.append([line[:column].strip(), line[column:]])
        elif re.fullmatch(r"\w+(, \w+)+", line):  # names that are longer; the text follows
            rows.append([line, ""])
        else:
            return block
    shown = []
    for names, text in rows:
        cell = ", ".join(f"`{name}`" for name in names.split(", "))
        shown.append(f"| {cell} | {text.strip()} |".replace("||", "\\|\\|"))
    return "\n".join(("| name | meaning |", "|---|---|", *shown))
