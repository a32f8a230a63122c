"""Processes that `torchrun` started, on one host or several, instead of those that a session starts itself.

Every process runs the same command. Process 0 leads and does everything that one process does alone; it tells the
others through torchrun's store where it listens. They follow: `follow` does the leader's calls and ends the process
with it, so whatever the command would do besides is done once.
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
NOBODY = b"{}"  # what a leader that ends without leading leaves there


@dataclass(frozen=True, slots=True)
class Place:
    """This process among those of torchrun. host: the leader's, as all can reach it."""

    rank: int
    local_rank: int
    size: int
    host: str

    @classmethod
    def here(cls) -> "Place | None":
        """None when torchrun did not start this process, or this one alone."""
        if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return None
        rank, local, size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        return cls(rank, local, size, os.environ["MASTER_ADDR"])

    def check(self, gpus: int | str) -> int:
        """How many processes there are. InputError when another number was asked for."""
        if gpus not in (self.size, "all"):
            raise InputError(f"torchrun started {self.size} processes: give --gpus {self.size} or --gpus all.")
        return self.size


@functools.cache
def torchrun_store() -> Any:
    """torchrun's store; a process can join it once."""
    from torch.distributed import rendezvous

    store, _, _ = next(rendezvous("env://"))
    return store


def announce(host: str, port: int, key: bytes) -> None:
    """Tell the followers where the leader listens."""
    torchrun_store().set(LEADER, json.dumps({"host": host, "port": port, "key": key.hex()}))


def lead_or_follow() -> None:
    """What a command does first that may be started by torchrun: returns in process 0, and where there is no torchrun;
    the others follow here until the leader ends, and end too."""
    place = Place.here()
    if place is None:
        return
    if place.rank:
        follow(place)
    atexit.register(_release)


def follow(place: Place) -> None:
    """Be process `place.rank` of the leader's session, then end this process."""
    from scail2_rt.runtime.distributed.worker import serve

    told = json.loads(torchrun_store().get(LEADER))
    if told:
        channel = Channel.to((told["host"], told["port"]), bytes.fromhex(told["key"]))
        channel.send(("hello", (place.rank, place.local_rank)))
        serve(channel, channel.receive())
    sys.stdout.flush()
    os._exit(0)  # libraries' threads may outlive their groups


def _release() -> None:
    """The leader ends: followers that still wait for it end too."""
    store = torchrun_store()
    if not store.check([LEADER]):
        store.set(LEADER, NOBODY)
