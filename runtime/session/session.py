"""The public API: a session holds open engines and runs requests on them.

    with Session.open("engines/") as session:
        plan = session.check(Request(…))
        session.generate(plan, "out.mp4", on_progress=print)

A session opens its engines once. Between requests it keeps prompt encodings, rotary tables and recorded steps (per
layout) and time embeddings (per schedule). It prints nothing, sets no signal handler, and works in any thread, one
generation at a time. After a cancelled or failed request it is ready for the next one."""

import contextlib
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scail2_rt.engines.engine_set import EngineSet, Execution
from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.runtime.core.plan import Plan
from scail2_rt.runtime.core.progress import Cancelled, Listener, RunProgress
from scail2_rt.runtime.core.request import Output, Request
from scail2_rt.runtime.core.warnings import collecting
from scail2_rt.runtime.distributed.gpus import Gpus, check_heads
from scail2_rt.runtime.distributed.leading import LeadingConstants
from scail2_rt.runtime.distributed.opening import open_team
from scail2_rt.runtime.distributed.team import Team
from scail2_rt.runtime.pipeline.constants import Constants
from scail2_rt.runtime.pipeline.history import Carry
from scail2_rt.runtime.pipeline.pipeline import Frames, Machine, animate_plan
from scail2_rt.runtime.pipeline.placement import Placement, apply, lift_limit
from scail2_rt.runtime.pipeline.text import MAX_TOKENS, PromptCache, Tokenizer
from scail2_rt.runtime.pipeline.transformer import release_prefetched
from scail2_rt.runtime.session.check import check_request
from scail2_rt.runtime.session.estimate import Rates, estimate
from scail2_rt.runtime.session.memory import place
from scail2_rt.runtime.session.resume import noise_generator

if TYPE_CHECKING:
    from scail2_rt.runtime.session.write import Result


class Session:
    """The engines of one folder, ready for requests. Use it as a context manager, or call `close`.

    engines     the stages
    team        the processes on other GPUs; None for one GPU
    constants   tensors and recorded steps that are kept between requests
    warnings    sentences about the last generation, in addition to the plan's warnings
    timings     seconds per phase of the last generation
    others      function that returns the bytes of GPU memory that other code in this process holds; called before
                weights are placed"""

    def __init__(self, engines: EngineSet, prompt_cache: "Path | str | None" = None, team: Team | None = None) -> None:
        self.engines, self.team = engines, team
        self.constants = Constants(engines) if team is None else LeadingConstants(engines, team)
        self.prompts = PromptCache(prompt_cache, engines.encoder_hash)
        self.rates = Rates(engines, self.gpus)
        self.warnings: list[str] = []
        self.timings: Mapping[str, float] = {}
        self.others: Callable[[], int] = lambda: 0
        self._folder_warnings = engines.warnings  # added to the first plan
        self._busy = threading.Lock()
        self._closed = False

    @classmethod
    def open(
        cls,
        folder: "Path | str",
        *,
        backend: str = "auto",
        execution: Execution | None = None,
        device: str | None = None,
        prompt_cache: "Path | str | None" = None,
        gpus: Gpus = 1,
    ) -> "Session":
        """Open an engine folder. Weights are loaded later, by the first generation.

        backend        executor: auto, torch, onnxruntime, tensorrt or tensorrt-rtx; only auto may choose another one
        execution      attention, rows per call, CUDA graphs, GPU memory limit
        device         cpu or cuda; by default the device on which the executor is fastest
        prompt_cache   folder for prompt encodings; by default the user's cache folder
        gpus           number of GPUs that share each generation, or "all" (docs/several-gpus.md); on a CPU, processes

        Raises InputError if the folder is damaged, was written by another version, or lacks the named backend, and for
        a number of GPUs that the machine does not have or that does not divide the model's heads."""
        engines, team = open_team(Path(folder), backend, execution or Execution(), device, gpus)
        return cls(engines, prompt_cache, team)

    @property
    def gpus(self) -> int:
        """Number of GPUs (on a CPU, processes) that share a generation."""
        return 1 if self.team is None else self.team.size

    @property
    def choice(self) -> str:
        """One printable line: the executor, its device, and the reason for the choice."""
        return self.engines.choice + (f"; shared by {self.gpus} processes" if self.team is not None else "")

    def check(self, request: Request, on_progress: Listener | None = None) -> Plan:
        """Return the generation plan of a request, with `plan.warnings` and `plan.estimate`. Media are read, weights
        are not. `on_progress` is called if this takes more than two seconds.

        Raises InputError for the first problem found. The command line prints the same sentence."""
        return self.fit(check_request(request, on_progress))

    def fit(self, plan: Plan) -> Plan:
        """Return a plan of `check_request`, completed with the facts that depend on these engines: the estimate,
        warnings about the prompts and, in the first plan of a session, about the engine folder.

        Raises InputError if the run does not fit this machine."""
        if self.team is not None:
            check_heads(self.gpus, self.engines.config.dit, plan.request.passes)
        if plan.request.noise_device == "cuda" and not torch.cuda.is_available():
            raise InputError("--noise-device cuda was given, but PyTorch finds no CUDA GPU. Use cpu.")
        placement = self.place(plan)
        with self._on_device():
            expected = estimate(plan, self.engines, placement, self.rates)
        warnings = dict.fromkeys([*plan.warnings, *self._folder_warnings, *self._prompt_warnings(plan)])
        self._folder_warnings = ()
        return replace(plan, warnings=tuple(warnings), estimate=expected)

    def animate(
        self, plan: Plan, on_progress: Listener | None = None, cancel: threading.Event | None = None
    ) -> Iterator[np.ndarray]:
        """Yield the plan's frames in batches, uint8 RGB [n, H, W, 3]. Closing the iterator ends the run.

        on_progress   called with a `Progress` at every phase and step; an exception that it raises ends the run
        cancel        once it is set, the run raises `Cancelled` within one denoising step

        Raises Scail2Error if the session is closed or runs another generation, or if the run fails."""
        run = RunProgress(on_progress, cancel)
        noise = noise_generator(plan.request.noise_device, plan.request.seed)
        with self.claimed(), contextlib.closing(self.frames(plan, run, noise)) as made:
            for frames in made:
                if len(frames.pixels):
                    yield frames.pixels.numpy()
        self.rates.remember(plan, run.timings)
        run.end()

    def generate(
        self,
        plan: Plan,
        output: "Output | Path | str",
        on_progress: Listener | None = None,
        cancel: threading.Event | None = None,
    ) -> "Result":
        """Write the plan's video, with the audio of the driving clip, and a JSON report beside it.

        output                a path, or an `Output` with codec, crf, overwrite, resume and metadata
        on_progress, cancel   as in `animate`

        If a run is interrupted or fails, the finished segments are kept as `NAME.partial.mp4` and the report is
        written. Raises InputError for an output that cannot be written, must not be replaced, or is being written by
        another run; Scail2Error as `animate`."""
        from scail2_rt.runtime.session.write import write_video

        return write_video(self, plan, Output.of(output), RunProgress(on_progress, cancel))

    def place(self, plan: Plan) -> Placement | None:
        """Return the placement of the weights for this plan, given the GPU memory that is free now. None if the runtime
        does not place weights. Raises InputError if the plan does not fit."""
        with self._on_device():
            return place(plan, self.engines, self.gpus, self.others())

    def frames(
        self,
        plan: Plan,
        progress: RunProgress,
        noise: torch.Generator,
        carry: Carry | None = None,
        placement: Placement | None = None,
        notes: Sequence[str] = (),
    ) -> Generator[Frames, None, None]:
        """Yield frames, and after each segment the state for the next one. The session must be `claimed`. If the run
        fails, all weights and kept tensors are dropped.

        noise      generator of the noise
        carry      state to resume from; None starts at the first segment
        placement  of the weights; None computes it
        notes      first entries of the run's warnings"""
        try:
            self.warnings[:] = notes
            self.timings = progress.timings
            placement = placement or self.place(plan)
            if self.team is not None:
                self.team.settle()  # a process may have died since the previous run
            with self._on_device():
                if placement is not None:
                    if set(placement.streamed) != set(self.engines.streamed):
                        self.constants.drop_transformers()  # recorded steps use the old addresses of the weights
                    apply(placement, self.engines, self.others())
                if isinstance(self.constants, LeadingConstants):
                    self.constants.place(placement)
            machine = Machine(self.engines, self.constants, progress, placement)
            with contextlib.closing(animate_plan(plan, machine, noise, carry, self.prompts)) as made:
                while (frames := self._next(made)) is not None:
                    yield frames
        except (Cancelled, KeyboardInterrupt, GeneratorExit):
            if self.team is not None:
                self.team.settle()
            raise  # loaded weights and constants stay valid
        except BaseException as error:
            explained = error if self.team is None else self.team.told(error)
            self._forget()
            if explained is not error:
                raise explained from error
            raise
        finally:
            if placement is not None:
                with self._on_device():
                    release_prefetched(self.engines)  # if the run ended before it used them
                    lift_limit(self.engines)

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Reserve the session for one generation. Raises Scail2Error if it is closed or already reserved."""
        if self._closed:
            raise Scail2Error("The session is closed. Open another one.")
        if not self._busy.acquire(blocking=False):
            raise Scail2Error(
                "The session is already generating, and it runs one generation at a time. Wait for it to finish, or "
                "open another session."
            )
        try:
            yield
        finally:
            self._busy.release()

    def close(self) -> None:
        """Release weights, files and memory. Raises Scail2Error while a generation is running."""
        if self._closed:
            return
        if not self._busy.acquire(blocking=False):
            raise Scail2Error("The session is generating. End the generation before you close the session.")
        self._closed = True
        self.constants.drop()
        if self.team is not None:
            self.team.close()
        self.engines.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(*(() if error is None else (Scail2Error,))):  # keep the first error
            self.close()

    def _next(self, made: Iterator[Frames]) -> Frames | None:
        """Return the next frames, or None. The device and gradient modes are set only while the frames are computed,
        not while the caller uses them."""
        with self._on_device(), torch.inference_mode(False), torch.no_grad(), collecting(self.warnings):
            return next(made, None)

    def _on_device(self) -> "contextlib.AbstractContextManager[Any]":
        """Return a context that selects this session's GPU, because new threads start on GPU 0."""
        return (
            torch.cuda.device(self.engines.device) if self.engines.device.type == "cuda" else contextlib.nullcontext()
        )

    def _forget(self) -> None:
        """Drop everything that a failed run may have left incomplete, so that the next request starts fresh."""
        self.constants.drop()
        if self.team is not None:
            self.team.end()
        self.engines.release("")
        if self.engines.device.type == "cuda":
            with self._on_device():
                torch.cuda.empty_cache()

    def _prompt_warnings(self, plan: Plan) -> list[str]:
        """Return a sentence for each prompt that reaches the model's token limit; the rest of it may be cut off."""
        tokenizer = self.engines.directory / "tokenizer" / "tokenizer.json"
        if not tokenizer.is_file():
            return []
        reader = Tokenizer(tokenizer)
        prompts = {"prompt": plan.request.prompt, "negative prompt": plan.request.negative_prompt}
        return [
            f"The {name} reaches the limit of {MAX_TOKENS} tokens: any text after them is ignored."
            for name, text in prompts.items()
            if len(reader.encode(text)) == MAX_TOKENS
        ]
