"""The engine folder on a node: a folder that every node has, or a copy fetched from a URL. The digest of the manifest
identifies the engines."""

import hashlib
import tempfile
from pathlib import Path

from scail2_rt.kernels.cache_folder import cache_directory
from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.cluster.objects import Objects


def digest_of(folder: Path) -> str:
    """The SHA-256 of an engine folder's manifest, which lists the hashes of all files. Raises InputError if there is
    none."""
    try:
        return hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(
            f"{folder} is not an engine folder on this node ({error.strerror}). Make one with scail2-rt build-engines."
        ) from error


def digest_at(engines: str) -> str:
    """The digest of the engines in a folder or at a URL. Raises InputError if there are none."""
    if "://" not in engines:
        return digest_of(Path(engines))
    try:
        manifest = Objects(engines).get("manifest.json")
    except InputError:
        raise
    except Exception as error:  # each storage library raises its own exceptions
        raise InputError(
            f"{engines} cannot be read ({type(error).__name__}: {error}). Check the URL and the access rights."
        ) from error
    if manifest is None:
        raise InputError(f"{engines} is not an engine folder. Copy one there, manifest.json last.")
    return hashlib.sha256(manifest).hexdigest()


def local_engines(engines: str, digest: str) -> Path:
    """The engine folder on this node, fetched to the cache folder if `engines` is a URL. Raises InputError if its
    digest is not `digest`."""
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
                if not folder.is_dir():  # another replica on this node may have fetched it
                    (Path(temporary) / "engines").rename(folder)
    found = digest_of(folder)
    if found != digest:
        raise InputError(
            f"{engines} on this node has other engines ({found[:12]}) than the service was deployed with "
            f"({digest[:12]}). Copy the folder to every node."
        )
    return folder
