"""Opening one engine folder in every process of a session."""

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
    """The engines of this process, and the team of `gpus` of them, whose other processes are being started; None for
    one GPU. InputError as `open_engines`, and for a number of GPUs that cannot be. Of processes that torchrun started
    only the first returns from here: the others follow it and end with it."""
    if gpus == 1:
        return open_engines(folder, backend, execution, device), None
    place = Place.here()
    if place is not None and place.rank:
        follow(place)
    if torch.cuda.is_available():  # process 0 takes GPU 0, as number n takes GPU n
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
    """The engines of a folder on a device, in a process that uses no other."""
    return open_engines(folder, backend, execution, device.type)
