"""What the operator of a service decides, as one record that checks itself."""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from scail2_rt.kernels.errors import InputError

DAY_S = 86_400
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Limits:
    """What a client may ask for.

    upload_bytes       of one request's body
    frames, pixels     of a clip; height times width of an input picture and of the output
    decode_s, decode_bytes   what checking one job's inputs may take, in a process of its own
    queued, queued_per_key   jobs that wait or run; of all clients, and of one
    file_bytes         what one client may keep as files
    body_wait_s        how long a client may be silent while it sends
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
    """One service.

    engines, data      the engine folder; where jobs, files and the database are
    host, port         where it listens; port 0 takes a free one
    workers            worker processes: one per group of `gpus_per_video` GPUs, or one on the CPU
    key_file           API keys, one per line
    allow_hosts        names beside `host` by which clients may call the service
    fetch_hosts        hosts from which inputs may be fetched by URL; none by default
    keep_s             how long results are kept
    disk_bytes         what the data folder may take; the oldest results go first; None: no limit
    model              the name that clients see
    segmenter, segmenter_weights   what makes masks, and its folder
    warm               run a very small video at the start, so that the first request finds loaded weights
    kills              of a job's worker without another finished segment, after which the job fails
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
    kills: int = 20
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        object.__setattr__(self, "host", self.host.strip("[]"))  # an IPv6 address may be given as in a URL
        if not 0 <= self.port <= 65_535:
            raise InputError(f"--port must be 0 to 65535, not {self.port}.")
        if not is_loopback(self.host) and self.key_file is None:
            raise InputError(
                f"--host {self.host} is reached from other machines: give --api-key-file FILE, or leave --host out."
            )


def address_of(host: str, port: int) -> str:
    """`127.0.0.1:8000`, `[::1]:8000`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a service on `host`."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_keys(file: Path | None) -> tuple[str, ...]:
    """The keys of a file: one per line, blank lines and lines with `#` left out. InputError for a file without one, and
    for a key that can be guessed."""
    if file is None:
        return ()
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The key file {file} cannot be read ({error}).") from error
    keys = tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not keys:
        raise InputError(f"The key file {file} holds no key: write one per line (`openssl rand -hex 24` makes one).")
    if any(len(key) < 16 or not key.isascii() or not key.isprintable() for key in keys):
        raise InputError(f"A key in {file} is shorter than 16 characters or not plain text: make longer ones.")
    return keys
