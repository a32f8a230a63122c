"""The training loop that VAE and transformer share: a budget of minutes or steps, several GPUs, and resumption.

The learning rate warms up and falls along a cosine over the share of the budget that is spent, so a rented hour can be
filled exactly. A state file keeps weights, their moving average, the optimiser and the time spent; an interrupted
training goes on from it and loses a minute at most. With `torchrun` every process draws its own batches and gradients
are averaged.
"""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from scail2_rt.export.errors import InputError

WARM_UP = 0.02  # share of the budget
SAVE_EVERY_S = 60.0
LOG_EVERY = 50
AVERAGE = 0.999


@dataclass(frozen=True, slots=True)
class Budget:
    """Minutes of training, over all of its runs, or steps."""

    minutes: float = 0.0
    steps: int = 0

    def spent(self, seconds: float, steps: int) -> float:
        """Share of it, 0…1."""
        return min(steps / self.steps if self.steps else seconds / (60 * self.minutes), 1.0)


@dataclass(frozen=True, slots=True)
class Workers:
    """This process among those that train together (`torchrun`), and its device."""

    rank: int
    count: int
    device: torch.device

    @classmethod
    def here(cls) -> "Workers":
        rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        if count > 1:
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(rank, count, device)

    def average(self, tensors: list[Tensor]) -> None:
        """Replace tensors by their mean over all processes, in one message."""
        if self.count > 1:
            flat = torch.cat([t.reshape(-1) for t in tensors])
            torch.distributed.all_reduce(flat)
            flat /= self.count
            for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()

    def agree(self, value: float) -> float:
        """The first process's value, so that all stop at the same step."""
        if self.count == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        torch.distributed.broadcast(shared, 0)
        return float(shared.item())


def fit(
    model: nn.Module,
    loss: Callable[[torch.Generator], Tensor],
    budget: Budget,
    peak_rate: float,
    workers: Workers,
    state_file: Path,
    log_file: Path,
    identity: str = "",
) -> dict[str, Tensor]:
    """Train until the budget is spent → the moving average of the weights, fp32 on the CPU.

    `identity` names what is learnt from; InputError where the state file is of something else.
    `loss` makes a batch with the given generator (on the device) and returns its loss. Progress is appended to
    `log_file`, a JSON object a line."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, peak_rate, betas=(0.9, 0.98), weight_decay=0.01)
    average = [p.detach().clone() for p in parameters]
    steps, seconds = _resume(state_file, model, optimiser, average, identity)
    generator = torch.Generator(workers.device).manual_seed(workers.rank + workers.count * steps)
    began, saved = time.monotonic() - seconds, time.monotonic()
    running, summed = torch.zeros((), device=workers.device), 0
    while (share := workers.agree(budget.spent(time.monotonic() - began, steps))) < 1:
        rate = peak_rate * min(share / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * share)) + 1e-6
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad(set_to_none=True)
        value = loss(generator)
        value.backward()
        workers.average([p.grad for p in parameters if p.grad is not None])
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        steps += 1
        keep = min(AVERAGE, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - keep)
        running, summed = running + value.detach(), summed + 1
        if workers.rank == 0 and steps % LOG_EVERY == 0:
            line = {"step": steps, "seconds": round(time.monotonic() - began, 1), "rate": rate}
            _append(log_file, {**line, "loss": round(running.item() / summed, 6)})
            running, summed = torch.zeros_like(running), 0
        if workers.rank == 0 and time.monotonic() - saved > SAVE_EVERY_S:
            _save(state_file, model, optimiser, average, steps, time.monotonic() - began, identity)
            saved = time.monotonic()
    if workers.rank == 0:
        _save(state_file, model, optimiser, average, steps, time.monotonic() - began, identity)
        _append(log_file, {"step": steps, "seconds": round(time.monotonic() - began, 1), "workers": workers.count})
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return {name: t.cpu() for name, t in zip(names, average, strict=True)}


def _append(file: Path, line: dict[str, float]) -> None:
    with file.open("a") as log:
        log.write(json.dumps(line) + "\n")
    print(f"{file.stem}: {line}", flush=True)


def _save(
    file: Path,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    average: list[Tensor],
    steps: int,
    seconds: float,
    identity: str,
) -> None:
    state = {
        "model": model.state_dict(), "optimiser": optimiser.state_dict(), "average": average,
        "steps": steps, "seconds": seconds, "identity": identity,
    }  # fmt: skip
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(file)


def _resume(
    file: Path, model: nn.Module, optimiser: torch.optim.Optimizer, average: list[Tensor], identity: str
) -> tuple[int, float]:
    """Steps and seconds that earlier runs spent; everything else is as they left it."""
    if not file.is_file():
        return 0, 0.0
    state = torch.load(file, map_location="cpu", weights_only=True)
    if state["identity"] != identity:
        raise InputError(
            f"{file} is of another training ({state['identity']}, this one is {identity}): remove it, or give another "
            "--work."
        )
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    for mine, theirs in zip(average, state["average"], strict=True):
        mine.copy_(theirs)
    return int(state["steps"]), float(state["seconds"])
