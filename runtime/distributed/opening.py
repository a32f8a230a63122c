"""Opening one engine folder on every rank of a session."""

from functools import partial
from pathlib import Path

import torch

from scail2_rt.engines.engine_set import EngineSet, Execution, open_engines
from scail2_rt.runtime.distributed.gpus import Gpus, check_heads, count_gpus
from scail2_rt.runtime.distributed.team import Team
from scail2_rt.runtime.distributed.torchrun import Place, follow


def open_team(
    folder: Path, backend: str, execution: Execution, device: str | None, gpus: Gpus
) -> tuple[EngineSet, Team | None]:
    """Open the engines of this rank, and start the other ranks: (engines, team), with None instead of a team for 1 GPU.

    Raises InputError as `open_engines`, and for an impossible number of GPUs. Under torchrun, only rank 0 returns from
    here: the others follow the leader and end with it."""
    if gpus == 1:
        return open_engines(folder, backend, execution, device), None
    place = Place.here()
    if place is not None and place.rank:
        follow(place)
    if torch.cuda.is_available():  # rank 0 uses GPU 0, as rank n uses GPU n
        torch.cuda.set_device(0)
    engines = open_engines(folder, backend, execution, device)
    try:
        size = count_gpus(gpus, engines.device.type) if place is None else place.check(gpus)
        check_heads(size, engines.config.dit)
        if size == 1:
            return engines, None
        team = Team(size, engines.device, partial(open_on, folder, engines.backend, execution), place)
        team.start()
    except BaseException:
        engines.close()
        raise
    return engines, team


def open_on(folder: Path, backend: str, execution: Execution, device: torch.device) -> EngineSet:
    """Open the engines of a folder on a device, in a process that uses no other device."""
    return open_engines(folder, backend, execution, device.type)
