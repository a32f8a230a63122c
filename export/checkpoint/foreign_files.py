"""Files that are whole but hold no weights, though they are named so: told for what they are, and what to get instead.

A repository cloned without its large files has pointers in their place; a link to a page for people gives a web page.
Neither is damaged, so getting the same thing again helps nobody.
"""

import re
from pathlib import Path

from scail2_rt.kernels.errors import InputError

_HEAD = 1024  # bytes looked at
_LFS = b"version https://git-lfs.github.com/spec/"
_MARKUP = re.compile(rb"\s*(<!--.*?-->\s*)?<(!doctype html|html|head|body)", re.IGNORECASE | re.DOTALL)
_XML = re.compile(rb"\s*<(\?xml|Error)", re.IGNORECASE)
_ARCHIVES = {b"7z\xbc\xaf": "7-Zip", b"Rar!": "RAR", b"\x1f\x8b": "gzip", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}


def refuse_foreign(path: Path) -> None:
    """InputError: the file is a Git LFS pointer, a web page, a text or an archive. One that cannot be read passes."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return
    if said := _told(path, head):
        raise InputError(f"{path} is {said}")


def _told(path: Path, head: bytes) -> str | None:
    if head.startswith(_LFS):
        size = re.search(rb"^size (\d+)", head, re.MULTILINE)
        stands = f" that stands for a file of {int(size.group(1)):,} bytes" if size else ""
        return (
            f"a Git LFS pointer{stands}, not the weights: the repository was cloned without its large files. "
            f"Run `git lfs pull` in {path.parent}, or fetch the file with `hf download`"
        )
    if _MARKUP.match(head.removeprefix(b"\xef\xbb\xbf")):
        return (
            "a web page (HTML), not weights: the link led to a page for people or to a sign-in. On Hugging Face the "
            "file itself is under /resolve/ instead of /blob/; `hf download REPOSITORY FILE` gets it, after `hf auth "
            "login` where the repository asks for it"
        )
    if _XML.match(head):
        return "an XML answer of a server (an error, mostly), not weights; open it to read what the server said"
    for magic, name in _ARCHIVES.items():
        if head.startswith(magic):
            return f"an archive ({name}), not weights; unpack it and give the file inside"
    if head.lstrip()[:1] in (b"{", b"E", b"I", b"A", b"N") and _is_text(head):
        line = head.decode().strip().splitlines()[0][:80]
        return f"a text that begins {line!r}, not weights; give a *.safetensors, *.gguf, *.pth or *.pt file"
    return None


def _is_text(head: bytes) -> bool:
    """Whether these bytes read as words; a few bytes may be anything."""
    try:
        text = head.decode()
    except UnicodeDecodeError:
        return False
    return len(text) >= 8 and all(character.isprintable() or character in "\t\r\n" for character in text)
