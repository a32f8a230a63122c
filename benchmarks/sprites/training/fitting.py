"""The training loop for VAE, transformer and segmenter: a budget in minutes or steps, several GPUs, resuming.

There are a few kinds of batches. On a GPU, loss and gradients of each kind are recorded as a CUDA graph, because
launching the thousands of small kernels of a step from Python takes twice as long as running them.

The learning rate warms up and then decays along a cosine over the used share of the budget. The clock starts after the
graphs are recorded. A state file stores the weights, their moving average, the optimiser states and the time used; an
interrupted training resumes from it and loses at most a minute. With `torchrun`, every process draws its own batches
and gradients are averaged.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scail2_rt.kernels.errors import InputError

WARM_UP = 0.02  # share of the budget
SAVE_EVERY_S = 60.0
LOG_EVERY = 100
AGREE_EVERY = 10  # steps between checks of the clock, at which the processes synchronise
AVERAGE = 0.999
MOMENTUM = 0.95  # Muon's
Loss = Callable[[torch.Generator], Tensor]  # draws a batch with the generator, on its device, and returns the loss


@dataclass(frozen=True, slots=True)
class Budget:
    """The length of a training over all its runs: minutes, or steps if not 0."""

    minutes: float = 0.0
    steps: int = 0

    def spent(self, seconds: float, steps: int) -> float:
        """The used share of the budget, 0…1."""
        return min(steps / self.steps if self.steps else seconds / (60 * self.minutes), 1.0)


@dataclass(frozen=True, slots=True)
class Workers:
    """This process in a group of training processes (`torchrun`): rank, number of processes, device."""

    rank: int
    count: int
    device: torch.device

    @classmethod
    def here(cls) -> "Workers":
        """This process, from torchrun's environment; initialises the process group."""
        rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        if count > 1:
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(rank, count, device)

    @property
    def compute(self) -> torch.dtype:
        """The dtype of convolutions."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def part(self, seeds: range) -> range:
        """The seeds of this process. With more processes than seeds, the last processes share a seed."""
        mine = max(len(seeds) // self.count, 1)
        first = min(self.rank * mine, len(seeds) - mine)
        return seeds[first : first + mine]

    def average(self, tensor: Tensor) -> None:
        """Replace a tensor by its mean over all processes."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor)
            tensor /= self.count

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.count > 1:
            torch.distributed.barrier()

    def agree(self, value: float) -> float:
        """The value of rank 0, so that all processes stop at the same step."""
        if self.count == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        torch.distributed.broadcast(shared, 0)
        return float(shared.item())


@dataclass(frozen=True, slots=True)
class Training:
    """One training.

    budget, workers   its length, its processes
    work, name        its files are `work`/`name`.state and `work`/`name`.jsonl
    identity          description of the data; a state file with another one is refused
    recorded          use CUDA graphs on a GPU"""

    budget: Budget
    workers: Workers
    work: Path
    name: str
    identity: str = ""
    recorded: bool = True

    @property
    def state_file(self) -> Path:
        return self.work / f"{self.name}.state"

    @property
    def log_file(self) -> Path:
        return self.work / f"{self.name}.jsonl"


def adam(parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """AdamW. rate: peak learning rate."""
    parameters = list(parameters)
    fused = parameters[0].device.type == "cuda"
    return torch.optim.AdamW(parameters, rate, betas=(0.9, 0.98), weight_decay=0.01, fused=fused)


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` (`adjust_lr_fn="match_rms_adamw"`, no weight decay) that updates all matrices of one shape in
    one batch. One after another, the transformer's 72 matrices would take longer than its gradients."""

    def __init__(self, matrices: Iterable[nn.Parameter], rate: float) -> None:
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for matrix in matrices:
            shapes.setdefault(matrix.shape, []).append(matrix)
        super().__init__([{"params": alike} for alike in shapes.values()], {"lr": rate})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            matrices = group["params"]
            gradient = torch.stack([matrix.grad for matrix in matrices])
            momentum = self.state[matrices[0]].setdefault("momentum", torch.zeros_like(gradient))
            momentum.lerp_(gradient, 1 - MOMENTUM)
            update = orthogonal(gradient.lerp(momentum, MOMENTUM)).to(gradient.dtype)
            rate = group["lr"] * 0.2 * math.sqrt(max(gradient.shape[1:]))
            torch._foreach_add_(matrices, list(update.unbind()), alpha=-rate)


def orthogonal(matrices: Tensor) -> Tensor:
    """Orthogonalise matrices [N, R, C] → bf16 with singular values near 1, by five Newton-Schulz steps. Source of the
    coefficients: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024."""
    x = matrices.bfloat16()
    x = x.mT if x.shape[1] > x.shape[2] else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


class Gradients:
    """The gradients of all parameters in one tensor, `flat`, and the computation of it for each kind of batch."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        losses: Sequence[Loss],
        generator: torch.Generator,
        record: bool = True,
    ) -> None:
        self.flat = torch.zeros(sum(p.numel() for p in parameters), device=generator.device)
        for parameter, part in zip(parameters, self.flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)
        self._losses, self._generator = losses, generator
        self._recorded: list[tuple[torch.cuda.CUDAGraph, Tensor]] = []
        if record and generator.device.type == "cuda":
            for kind in range(len(losses)):
                self._recorded.append(self._record(kind))

    def of(self, kind: int) -> Tensor:
        """Compute `flat` for a new batch of a kind. Returns its loss, which the next call may overwrite."""
        if not self._recorded:
            return self._compute(kind)
        graph, value = self._recorded[kind]
        graph.replay()
        return value

    def _compute(self, kind: int) -> Tensor:
        self.flat.zero_()
        value = self._losses[kind](self._generator)
        value.backward()
        return value.detach()

    def _record(self, kind: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # compiles, plans and allocates, which is not allowed during recording
            for _ in range(2):
                self._compute(kind)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        pool = self._recorded[0][0].pool() if self._recorded else None
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # NCCL polls in another thread
            value = self._compute(kind)
        return graph, value


class _Losses:
    """The sums of the losses of each kind of batch since the last line of the log."""

    def __init__(self, kinds: int, device: torch.device) -> None:
        self._sums, self._counts = torch.zeros(kinds, device=device), [0] * kinds

    def add(self, kind: int, loss: Tensor) -> None:
        self._sums[kind] += loss
        self._counts[kind] += 1

    def take(self) -> dict[str, Any]:
        """The mean loss over all batches and per kind (0 without a batch). Resets the sums."""
        sums = self._sums.tolist()
        each = [round(value / max(count, 1), 4) for value, count in zip(sums, self._counts, strict=True)]
        found = {"loss": round(sum(sums) / sum(self._counts), 6), "by kind": each}
        self._sums, self._counts = torch.zeros_like(self._sums), [0] * len(sums)
        return found


def fit(
    model: nn.Module,
    losses: Sequence[Loss],
    turn: Callable[[int], int],
    optimisers: Sequence[torch.optim.Optimizer],
    training: Training,
    watch: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Train until the budget is used up. Returns the moving average of the weights, fp32 on the CPU.

    losses       one per kind of batch
    turn         step → kind of its batch; the same in all processes
    optimisers   with peak learning rates
    watch        called with the number of steps after each line of the log

    The log file gets one JSON object per `LOG_EVERY` steps, with the mean loss over all batches and per kind. Raises
    InputError if the state file has another identity."""
    budget, workers = training.budget, training.workers
    parameters = [p for p in model.parameters() if p.requires_grad]
    peaks = [group["lr"] for optimiser in optimisers for group in optimiser.param_groups]
    average = [p.detach().clone() for p in parameters]
    steps, seconds = _resume(training, model, optimisers, average)
    groups = [group for optimiser in optimisers for group in optimiser.param_groups]  # resuming replaced them
    generator = torch.Generator(workers.device).manual_seed(workers.rank + workers.count * steps)
    gradients = Gradients(parameters, losses, generator, training.recorded)
    began, saved = time.monotonic() - seconds, time.monotonic()
    running = _Losses(len(losses), workers.device)
    share = workers.agree(budget.spent(time.monotonic() - began, steps))
    while share < 1:
        height = min(share / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * share)) + 1e-3
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * height
        kind = turn(steps)
        running.add(kind, gradients.of(kind))
        workers.average(gradients.flat)
        gradients.flat *= (1 / gradients.flat.norm()).clamp(max=1)
        for optimiser in optimisers:
            optimiser.step()
        steps += 1
        keep = min(AVERAGE, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - keep)
        if budget.steps:
            share = budget.spent(0, steps)
        elif steps % AGREE_EVERY == 0:
            share = workers.agree(budget.spent(time.monotonic() - began, steps))
        if workers.rank == 0 and steps % LOG_EVERY == 0:
            line = {"step": steps, "seconds": round(time.monotonic() - began, 1), "rate": round(height, 4)}
            _append(training.log_file, line | running.take())
            if watch is not None:
                watch(steps)
        if workers.rank == 0 and time.monotonic() - saved > SAVE_EVERY_S:
            _save(training, model, optimisers, average, steps, time.monotonic() - began)
            saved = time.monotonic()
    if workers.rank == 0:
        _save(training, model, optimisers, average, steps, time.monotonic() - began)
        last = {"step": steps, "seconds": round(time.monotonic() - began, 1), "workers": workers.count}
        _append(training.log_file, last)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return {name: t.cpu() for name, t in zip(names, average, strict=True)}


def _append(file: Path, line: dict[str, Any]) -> None:
    with file.open("a") as log:
        log.write(json.dumps(line) + "\n")
    print(f"{file.stem}: {line}", flush=True)


def _save(
    training: Training,
    model: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer],
    average: list[Tensor],
    steps: int,
    seconds: float,
) -> None:
    state = {
        "model": model.state_dict(), "optimisers": [o.state_dict() for o in optimisers], "average": average,
        "steps": steps, "seconds": seconds, "identity": training.identity,
    }  # fmt: skip
    partial = training.state_file.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(training.state_file)


def _resume(
    training: Training, model: nn.Module, optimisers: Sequence[torch.optim.Optimizer], average: list[Tensor]
) -> tuple[int, float]:
    """Restore the state of an earlier run. Returns its steps and seconds; (0, 0) without a state file."""
    file = training.state_file
    if not file.is_file():
        return 0, 0.0
    state = torch.load(file, map_location="cpu", weights_only=True)
    if state["identity"] != training.identity:
        raise InputError(
            f"{file} is of another training ({state['identity']}; this one is {training.identity}). Remove it, or give "
            "another --work."
        )
    model.load_state_dict(state["model"])
    for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(saved)
    for mine, theirs in zip(average, state["average"], strict=True):
        mine.copy_(theirs)
    return int(state["steps"]), float(state["seconds"])
