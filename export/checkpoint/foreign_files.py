"""Files with the name of a weights file that hold something else. The error says what they are and what to get instead.

A repository cloned without its large files contains pointers in their place; a link to a page gives an HTML file. Such
files are not damaged, so downloading them again does not help.
"""

import re
from pathlib import Path

from scail2_rt.kernels.errors import InputError

_HEAD = 1024  # number of bytes to inspect
_LFS = b"version https://git-lfs.github.com/spec/"
_MARKUP = re.compile(rb"\s*(<!--.*?-->\s*)?<(!doctype html|html|head|body)", re.IGNORECASE | re.DOTALL)
_XML = re.compile(rb"\s*<(\?xml|Error)", re.IGNORECASE)
_ARCHIVES = {b"7z\xbc\xaf": "7-Zip", b"Rar!": "RAR", b"\x1f\x8b": "gzip", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}


def refuse_foreign(path: Path) -> None:
    """Raise InputError if the file is a Git LFS pointer, a web page, text or an archive. Ignores unreadable files."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return
    if described := _described(path, head):
        raise InputError(f"{path} is {described}")


def _described(path: Path, head: bytes) -> str | None:
    if head.startswith(_LFS):
        size = re.search(rb"^size (\d+)", head, re.MULTILINE)
        size_text = f" for a file of {int(size.group(1)):,} bytes" if size else ""
        return (
            f"a Git LFS pointer{size_text}, not the weights: the repository was cloned without its large files. "
            f"Run `git lfs pull` in {path.parent}, or fetch the file with `hf download`"
        )
    if _MARKUP.match(head.removeprefix(b"\xef\xbb\xbf")):
        return (
            "a web page (HTML), not weights: the link led to a web page or a sign-in. On Hugging Face, files are under "
            "/resolve/, not /blob/. Run `hf download REPOSITORY FILE`, after `hf auth login` if the repository "
            "requires it"
        )
    if _XML.match(head):
        return "an XML answer of a server (usually an error), not weights. Open it to read the server's message"
    for magic, name in _ARCHIVES.items():
        if head.startswith(magic):
            return f"an archive ({name}), not weights. Unpack it and give the file inside"
    if head.lstrip()[:1] in (b"{", b"E", b"I", b"A", b"N") and _is_text(head):
        line = head.decode().strip().splitlines()[0][:80]
        return f"a text that begins {line!r}, not weights. Give a *.safetensors, *.gguf, *.pth or *.pt file"
    return None


def _is_text(head: bytes) -> bool:
    """Return whether these bytes are printable text of at least 8 characters."""
    try:
        text = head.decode()
    except UnicodeDecodeError:
        return False
    return len(text) >= 8 and all(character.isprintable() or character in "\t\r\n" for character in text)
