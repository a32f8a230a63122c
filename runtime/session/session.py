"""The public API: engines that are open, and requests that they carry out.

    with Session.open("engines/") as session:
        plan = session.check(Request(…))
        session.generate(plan, "out.mp4", on_progress=print)

A session opens its engines once and keeps what outlives a request: prompt encodings, rotary tables and recorded steps
by layout, time embeddings by schedule. It prints nothing, sets no signal handler, and works in any thread, one
generation at a time. Cancelling or failing leaves it ready for the next request."""

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
from scail2_rt.runtime.pipeline.transformer import release_contexts
from scail2_rt.runtime.session.check import check_request
from scail2_rt.runtime.session.estimate import Rates, estimate
from scail2_rt.runtime.session.memory import place
from scail2_rt.runtime.session.resume import noise_generator

if TYPE_CHECKING:
    from scail2_rt.runtime.session.write import Result


class Session:
    """The engines of one folder, ready for requests. Use as a context manager, or call `close`.

    engines     the stages, for benchmarks and tests; team: the processes on other GPUs, None for one GPU
    constants   what is kept from request to request
    warnings    sentences for the user that came up in the last generation, beside the plan's
    timings     seconds by phase of the last generation
    others      asked, before weights are placed, for the bytes of GPU memory that others in this process hold"""

    def __init__(self, engines: EngineSet, prompt_cache: "Path | str | None" = None, team: Team | None = None) -> None:
        self.engines, self.team = engines, team
        self.constants = Constants(engines) if team is None else LeadingConstants(engines, team)
        self.prompts = PromptCache(prompt_cache, engines.encoder_hash)
        self.rates = Rates(engines, self.gpus)
        self.warnings: list[str] = []
        self.timings: Mapping[str, float] = {}
        self.others: Callable[[], int] = lambda: 0
        self._untold = engines.warnings  # about the folder, for the first plan
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
        """Open an engine folder; no weights are loaded yet.

        backend        the executor: auto, torch, onnxruntime, tensorrt or tensorrt-rtx; a named one is used or refused
        execution      how it runs: attention, rows per call, CUDA graphs, a limit of GPU memory
        device         cpu or cuda; by default where the executor is fastest
        prompt_cache   folder for prompt encodings; by default the user's cache folder
        gpus           how many GPUs share each generation, or "all" (docs/several-gpus.md); on a CPU, processes

        InputError when the folder is damaged, of another version, or lacks the backend that was named, and for a number
        of GPUs that is not there or does not divide the model's heads."""
        engines, team = open_team(Path(folder), backend, execution or Execution(), device, gpus)
        return cls(engines, prompt_cache, team)

    @property
    def gpus(self) -> int:
        """How many GPUs, on a CPU processes, share a generation."""
        return 1 if self.team is None else self.team.size

    @property
    def choice(self) -> str:
        """One printable line: what runs, where, and why."""
        return self.engines.choice + (f"; shared by {self.gpus} processes" if self.team is not None else "")

    def check(self, request: Request, on_progress: Listener | None = None) -> Plan:
        """What the request would do, with `plan.warnings` and `plan.estimate`. Media are read, weights are not.
        `on_progress` is called when that takes more than two seconds.

        InputError with one sentence for the first thing that is wrong: the sentence that the command line prints."""
        return self.fit(check_request(request, on_progress))

    def fit(self, plan: Plan) -> Plan:
        """A plan of `check_request` with what depends on these engines: the estimate, warnings about the prompt and, in
        the first plan of a session, about the engine folder. InputError when it does not fit this machine."""
        if self.team is not None:
            check_heads(self.gpus, self.engines.config.dit, plan.request.passes)
        if plan.request.noise_device == "cuda" and not torch.cuda.is_available():
            raise InputError("--noise-device cuda was given, but PyTorch finds no CUDA GPU here: use cpu.")
        placement = self.place(plan)
        with self._on_device():
            expected = estimate(plan, self.engines, placement, self.rates)
        warnings = dict.fromkeys([*plan.warnings, *self._untold, *self._prompt_warnings(plan)])
        self._untold = ()
        return replace(plan, warnings=tuple(warnings), estimate=expected)

    def animate(
        self, plan: Plan, on_progress: Listener | None = None, cancel: threading.Event | None = None
    ) -> Iterator[np.ndarray]:
        """The plan's frames, uint8 [n, H, W, 3], as they are made; closing the iterator ends the run.

        on_progress   is called with a `Progress` at every phase and step; what it raises ends the run
        cancel        once it is set, the run ends with `Cancelled` within one denoising step

        Scail2Error when the session runs another generation, or when something fails."""
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
        """Write the plan's video, with the driving video's sound, and a JSON report beside it.

        output        a path, or an `Output` with codec, crf, overwrite, resume and metadata
        on_progress, cancel   as in `animate`

        However a run ends, finished segments are kept as `NAME.partial.mp4`, and the report is written. InputError for
        an output that cannot be written, must not be replaced or is being written by another run; Scail2Error when the
        session runs another generation, or when something fails."""
        from scail2_rt.runtime.session.write import write_video

        return write_video(self, plan, Output.of(output), RunProgress(on_progress, cancel))

    def place(self, plan: Plan) -> Placement | None:
        """How the weights of this plan lie in GPU memory, with what is free now."""
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
        """What `animate` and `generate` consume: frames with what each segment leaves, from the segment after `carry`
        on, in a session that is `claimed`. A run that fails leaves nothing behind. notes: the first of the run's
        warnings."""
        try:
            self.warnings[:] = notes
            self.timings = progress.timings
            placement = placement or self.place(plan)
            if self.team is not None:
                self.team.settle()  # a process may have died since the run before
            with self._on_device():
                if placement is not None:
                    if set(placement.streamed) != set(self.engines.streamed):
                        self.constants.drop_transformers()  # recorded steps read weights that move now
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
            raise  # nothing is wrong with what is loaded
        except BaseException as error:
            told = error if self.team is None else self.team.told(error)
            self._forget()
            if told is not error:
                raise told from error
            raise
        finally:
            if placement is not None:
                with self._on_device():
                    release_contexts(self.engines)  # of a run that ended before it used them
                    lift_limit(self.engines)

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """One generation at a time. Scail2Error, before anything is touched, for a second one or a closed session."""
        if self._closed:
            raise Scail2Error("The session is closed: open another one.")
        if not self._busy.acquire(blocking=False):
            raise Scail2Error(
                "The session is generating already, and it runs one generation at a time: wait for it, or open another "
                "session."
            )
        try:
            yield
        finally:
            self._busy.release()

    def close(self) -> None:
        """Give back weights, files and memory. A generation that runs must be ended before."""
        if self._closed:
            return
        if not self._busy.acquire(blocking=False):
            raise Scail2Error("The session is generating: end the generation before the session is closed.")
        self._closed = True
        self.constants.drop()
        if self.team is not None:
            self.team.close()
        self.engines.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(*(() if error is None else (Scail2Error,))):  # what went wrong first is what is told
            self.close()

    def _next(self, made: Iterator[Frames]) -> Frames | None:
        """The next frames, in this session's modes, which must not last while the caller works with them."""
        with self._on_device(), torch.inference_mode(False), torch.no_grad(), collecting(self.warnings):
            return next(made, None)

    def _on_device(self) -> "contextlib.AbstractContextManager[Any]":
        """Threads start on GPU 0."""
        return (
            torch.cuda.device(self.engines.device) if self.engines.device.type == "cuda" else contextlib.nullcontext()
        )

    def _forget(self) -> None:
        """After a failure: whatever it left half done goes, so that the next request finds a fresh session."""
        self.constants.drop()
        if self.team is not None:
            self.team.end()
        self.engines.release("")
        if self.engines.device.type == "cuda":
            with self._on_device():
                torch.cuda.empty_cache()

    def _prompt_warnings(self, plan: Plan) -> list[str]:
        """A sentence for each prompt that fills what the model reads (it may well be longer)."""
        tokenizer = self.engines.directory / "tokenizer" / "tokenizer.json"
        if not tokenizer.is_file():
            return []
        reader = Tokenizer(tokenizer)
        prompts = {"prompt": plan.request.prompt, "negative prompt": plan.request.negative_prompt}
        return [
            f"The {name} fills the {MAX_TOKENS} tokens that the model reads: what comes after them is cut off."
            for name, text in prompts.items()
            if len(reader.encode(text)) == MAX_TOKENS
        ]
