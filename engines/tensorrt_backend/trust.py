"""Record of the plans that passed `verify` on this card. `auto` uses a library that compiles for other machines only
then.

Plans of such a library have not run on the machine that built them. So when a folder passes `verify` on a card, a
record is stored in the folder: the card, the library's version, and a digest of all plans. The record is not valid for
another card, version or plan.
"""

import hashlib
import json
import shlex
from collections.abc import Iterable
from pathlib import Path

from scail2_rt.engines.folder.manifest import Manifest, write_json
from scail2_rt.engines.tensorrt_backend.library import Library, require_library
from scail2_rt.engines.tensorrt_backend.preflight import find_gpu

VERIFIED = "verified.json"


def obstacle(library: Library, directory: Path, manifest: Manifest, files: Iterable[str]) -> str | None:
    """Return why `auto` must not use these plans, in words; None if they have passed on this card."""
    if _here(library, manifest, files) in _read(directory).get(library.name, []):
        return None
    words = ["scail2-rt", "verify", str(directory.absolute()), "--checkpoint", manifest.checkpoint]
    command = shlex.join([*words, "--backend", library.name])
    return f"{library.name} waits until its plans have passed on this card: {command}"


def remember(library: Library, directory: Path, manifest: Manifest, files: Iterable[str], passed: bool) -> None:
    """Record the result of `verify` on this card."""
    document, here = _read(directory), _here(library, manifest, files)
    others = [record for record in document.get(library.name, []) if record != here]
    document[library.name] = [*others, here] if passed else others
    write_json(directory / VERIFIED, document)


def _here(library: Library, manifest: Manifest, files: Iterable[str]) -> dict[str, str]:
    gpu, plans = find_gpu(), set(files)
    known = sorted((artefact.path, artefact.sha256) for artefact in manifest.artefacts if artefact.path in plans)
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()
    return {"gpu": gpu.text if gpu is not None else "", "version": require_library(library), "plans": digest}


def _read(directory: Path) -> dict[str, list[dict[str, str]]]:
    """Read the records; an unreadable file counts as empty."""
    try:
        document = json.loads((directory / VERIFIED).read_text())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
