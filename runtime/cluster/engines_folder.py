"""Engines on a node: a folder that every node has, or one that is brought from the store; told by their manifest."""

import hashlib
import tempfile
from pathlib import Path

from scail2_rt.kernels.cache_folder import cache_directory
from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.cluster.objects import Objects


def digest_of(folder: Path) -> str:
    """Of an engine folder: the SHA-256 of its manifest, which names the hash of everything in it. InputError for a
    folder without one."""
    try:
        return hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{folder} is no engine folder here ({error.strerror}).") from error


def digest_at(engines: str) -> str:
    """The same of a folder or a URL."""
    if "://" not in engines:
        return digest_of(Path(engines))
    try:
        manifest = Objects(engines).get("manifest.json")
    except InputError:
        raise
    except Exception as error:  # each store has its own
        raise InputError(f"{engines} cannot be read ({type(error).__name__}: {error}).") from error
    if manifest is None:
        raise InputError(f"{engines} is no engine folder: copy one there, its manifest.json last.")
    return hashlib.sha256(manifest).hexdigest()


def local_engines(engines: str, digest: str) -> Path:
    """The folder on this node. InputError when it holds other engines than the service was deployed with."""
    if "://" not in engines:
        folder = Path(engines)
    else:
        folder = cache_directory() / "engines" / digest[:32]
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            objects = Objects(engines)
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                for name in objects.names(""):
                    objects.fetch(name, Path(temporary) / "engines" / name)
                if not folder.is_dir():  # another replica of this node may have been faster
                    (Path(temporary) / "engines").rename(folder)
    found = digest_of(folder)
    if found != digest:
        raise InputError(
            f"{engines} holds other engines on this node ({found[:12]}) than the service was deployed with "
            f"({digest[:12]}): copy the folder to every node."
        )
    return folder
