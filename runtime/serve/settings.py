"""The settings of a service, chosen by its operator. They validate themselves."""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from scail2_rt.kernels.errors import InputError

DAY_S = 86_400
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits for clients.

    upload_bytes             bytes of one request's body
    frames                   frames of a video
    pixels                   height times width of an input frame and of the output
    decode_s, decode_bytes   seconds and bytes of memory for checking one job's inputs
    queued, queued_per_key   unfinished jobs of all clients, and of one
    file_bytes               bytes of files that one client may store
    body_wait_s              seconds without data after which a request is aborted
    """

    upload_bytes: int = 1 * GIB
    frames: int = 3_000
    pixels: int = 4096 * 4096
    decode_s: float = 120.0
    decode_bytes: int = 4 * GIB
    queued: int = 2_000
    queued_per_key: int = 500
    file_bytes: int = 20 * GIB
    body_wait_s: float = 20.0


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one service. Raises InputError for an invalid port and for a public host without keys.

    engines, data      the engine folder; the folder for jobs, files and the database
    host, port         address to listen on; port 0 takes a free port
    workers            worker processes: one per group of `gpus_per_video` GPUs, or one on the CPU
    on_gpu             the workers run on GPUs
    key_file           file with API keys, one per line; None: no keys
    allow_hosts        host names, beside `host`, by which clients may call the service
    fetch_hosts        hosts from which inputs may be fetched by URL; default: none
    keep_s             seconds for which results are kept
    disk_bytes         limit of the data folder, beyond which the oldest results are removed; None: no limit
    model              name of the model in the interface
    backend, max_rows, attention, vram_limit, no_graphs   as the options of `generate`
    segmenter, segmenter_weights   the segmenter that makes masks, and its folder
    warm               run a very small video at the start, so that the first request finds loaded weights
    limits             limits for clients
    """

    engines: Path
    data: Path
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    gpus_per_video: int = 1
    on_gpu: bool = False
    key_file: Path | None = None
    allow_hosts: tuple[str, ...] = ()
    fetch_hosts: tuple[str, ...] = ()
    keep_s: float = 7 * DAY_S
    disk_bytes: int | None = None
    model: str = "scail-2"
    backend: str = "auto"
    max_rows: int = 16_384
    attention: str = "auto"
    vram_limit: int | None = None
    no_graphs: bool = False
    warm: bool = True
    segmenter: str = "auto"
    segmenter_weights: Path | None = None

    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        object.__setattr__(self, "host", self.host.strip("[]"))  # an IPv6 address may be given as in a URL
        if not 0 <= self.port <= 65_535:
            raise InputError(f"--port must be 0 to 65535, not {self.port}.")
        if not is_loopback(self.host) and self.key_file is None:
            raise InputError(
                f"--host {self.host} is reachable from other machines. Give --api-key-file FILE, or leave --host out."
            )


def address_of(host: str, port: int) -> str:
    """`127.0.0.1:8000`, `[::1]:8000`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether a service on `host` is reachable only from this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_keys(file: Path | None) -> tuple[str, ...]:
    """The API keys in a file: one per line; blank lines and lines that start with `#` are skipped. Raises InputError
    for an unreadable file, a file without keys and a key that is too short."""
    if file is None:
        return ()
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The key file {file} cannot be read ({error}). Give a text file.") from error
    keys = tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not keys:
        raise InputError(f"The key file {file} has no key. Write one per line (`openssl rand -hex 24` makes one).")
    if any(len(key) < 16 or not key.isascii() or not key.isprintable() for key in keys):
        raise InputError(
            f"A key in {file} is shorter than 16 characters or not printable ASCII. Replace it (`openssl rand -hex 24` "
            "makes one)."
        )
    return keys
