"""Ranks started by `torchrun`, on one host or several, instead of by a session.

Every rank runs the same command. Rank 0 leads and does everything that a single process does; it publishes its address
in torchrun's store. The other ranks follow: `follow` runs the leader's calls and then ends the process, so that the
rest of the command runs only once.
"""

import atexit
import functools
import json
import os
import sys
from dataclasses import dataclass
from typing import Any

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.distributed.channel import Channel

LEADER = "scail2-rt/leader"
NOBODY = b"{}"  # published by a leader that ends without leading


@dataclass(frozen=True, slots=True)
class Place:
    """This process among the ranks of torchrun. host: the leader's host name, reachable from all ranks."""

    rank: int
    local_rank: int
    size: int
    host: str

    @classmethod
    def here(cls) -> "Place | None":
        """Return this rank, or None if torchrun did not start this process or started no other."""
        if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return None
        rank, local, size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        return cls(rank, local, size, os.environ["MASTER_ADDR"])

    def check(self, gpus: int | str) -> int:
        """Return the number of ranks. Raises InputError if another number was requested."""
        if gpus not in (self.size, "all"):
            raise InputError(f"torchrun started {self.size} processes, not {gpus}. Use --gpus {self.size} or all.")
        return self.size


@functools.cache
def torchrun_store() -> Any:
    """Return torchrun's store; a process can join it only once."""
    from torch.distributed import rendezvous

    store, _, _ = next(rendezvous("env://"))
    return store


def announce(host: str, port: int, key: bytes) -> None:
    """Publish the leader's address for the followers."""
    torchrun_store().set(LEADER, json.dumps({"host": host, "port": port, "key": key.hex()}))


def lead_or_follow() -> None:
    """Begin a command that torchrun may have started. Returns on rank 0 and without torchrun; on the other ranks it
    follows the leader until that ends, and then ends the process."""
    place = Place.here()
    if place is None:
        return
    if place.rank:
        follow(place)
    atexit.register(_release)


def follow(place: Place) -> None:
    """Serve as rank `place.rank` of the leader's session, then end this process."""
    from scail2_rt.runtime.distributed.worker import serve

    leader = json.loads(torchrun_store().get(LEADER))
    if leader:
        channel = Channel.to((leader["host"], leader["port"]), bytes.fromhex(leader["key"]))
        channel.send(("hello", (place.rank, place.local_rank)))
        serve(channel, channel.receive())
    sys.stdout.flush()
    os._exit(0)  # threads of libraries may outlive their groups


def _release() -> None:
    """At the leader's exit: end the followers that still wait for it."""
    store = torchrun_store()
    if not store.check([LEADER]):
        store.set(LEADER, NOBODY)
