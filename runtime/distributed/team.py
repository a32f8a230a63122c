"""The ranks of a session as the leader sees them: it starts them, calls them, and notices when one ends.

The leader runs the complete pipeline as on one GPU; only shared work is called on every rank (`distributed.leading`). A
call is sent to the other ranks and then executed here too, so that all meet in its collectives; there is no reply.
Between calls the other ranks wait, so a run can end at any time there. A call that is interrupted here leaves them in
an unknown state: they are ended, and started again for the next run. When a rank fails, all ranks are ended, every wait
for them is released, and the caller gets one error."""

import atexit
import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from scail2_rt.kernels.errors import Scail2Error
from scail2_rt.runtime.distributed.crew import Crew
from scail2_rt.runtime.distributed.peers import Groups
from scail2_rt.runtime.distributed.torchrun import Place
from scail2_rt.runtime.distributed.worker import Opener
from scail2_rt.runtime.pipeline.sharing import Sharing
from scail2_rt.runtime.pipeline.transformer import Transformer


class Team:
    """`size` ranks, of which this process is rank 0, on device `device` of each ("cpu" or "cuda").

    opener: opens the engines on the other ranks; place: this rank, if torchrun has started all ranks. `start` starts
    the ranks; the first call waits for them."""

    def __init__(self, size: int, device: torch.device, opener: Opener, place: Place | None = None) -> None:
        self.size, self.device, self.place, self._opener = size, device, place, opener
        self._crew: Crew | None = None
        self._gone = False
        self._recording: weakref.WeakSet[Transformer] = weakref.WeakSet()

    def start(self) -> None:
        """Start the ranks if there are none; does not wait. Raises Scail2Error if the ranks of torchrun have ended."""
        if self._crew is None:
            if self.place is not None and self._gone:
                raise Scail2Error("The ranks that torchrun started have ended. Start the command again.")
            self._crew, self._gone = Crew(self.size, self.device, self._opener, self.place), True
            atexit.register(self.end)  # the threads of a crew must end before the interpreter exits

    @property
    def processes(self) -> tuple[int, ...]:
        """Process ids of the other ranks, those started here."""
        return () if self._crew is None else tuple(process.pid for process in self._crew.processes)

    @property
    def groups(self) -> Groups:
        """This rank's process groups; waits until all ranks are ready."""
        return self._ready().groups

    def sharing(self, passes: int) -> Sharing:
        """Return how a forward pass of `passes` contexts is divided; see `pipeline.sharing.Ranks`."""
        return self.groups.sharing(passes)

    @contextlib.contextmanager
    def together(self, name: str, *arguments: Any) -> Iterator[Groups]:
        """Run `Worker.name(*arguments)` on every other rank while this rank runs the `with` block.

        Raises Scail2Error if a rank fails."""
        crew = self._ready()
        try:
            crew.in_call = True
            crew.call(name, *arguments)
            yield crew.groups
            crew.check()
        except BaseException as error:
            if failure := crew.failure_behind(error):
                raise failure from error
            raise
        crew.in_call = False

    def told(self, error: BaseException) -> BaseException:
        """Return the error to raise for a run's error: the failure of another rank that caused it, or the error."""
        crew = self._crew
        return error if crew is None else crew.failure_behind(error) or error

    @property
    def broken(self) -> bool:
        """Whether a rank has died or failed, or a call was interrupted."""
        return self._crew is not None and (self._crew.in_call or self._crew.failure is not None)

    def settle(self) -> None:
        """End the ranks if the team is broken. Called before a run, and after one that was ended from outside."""
        if self.broken:
            self.end()

    def end(self) -> None:
        """End the ranks at once; the next call starts new ones."""
        self._leave(Crew.end)

    def close(self) -> None:
        """Let the ranks finish and end."""
        self._leave(Crew.close)

    def leads(self, transformer: Transformer) -> None:
        """Register a transformer. Its captured steps refer to the groups, so they are freed before the groups."""
        self._recording.add(transformer)

    def _leave(self, how: Callable[[Crew], None]) -> None:
        crew, self._crew = self._crew, None
        atexit.unregister(self.end)
        for transformer in self._recording:
            transformer.drop_recording()
        if crew is not None:
            how(crew)

    def _ready(self) -> Crew:
        self.start()
        assert self._crew is not None
        self._crew.wait_ready()
        return self._crew
