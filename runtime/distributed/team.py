"""The processes of a session as the leading one sees them: it starts them, calls them, and notices when one is gone.

The leader runs the whole pipeline, as alone; only what is shared is called in every process (`distributed.leading`).
A call is sent first and then done here too, so that all meet in its collectives; nothing is answered. Between calls
the others wait, so a run can end there at any time. A call that is cut off here leaves them in the middle of
something: they are ended, and started again for the next run. When a process fails, all are ended, what waits for them
here is released, and whoever calls hears one sentence."""

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
    """`size` processes, this one among them as number 0, on device `device` of each ("cpu" or "cuda").

    opener: makes the engines of the others; place: of this process, where torchrun has started all of them. Processes
    start with `start` and are awaited when they are first called."""

    def __init__(self, size: int, device: torch.device, opener: Opener, place: Place | None = None) -> None:
        self.size, self.device, self.place, self._opener = size, device, place, opener
        self._crew: Crew | None = None
        self._gone = False
        self._recording: weakref.WeakSet[Transformer] = weakref.WeakSet()

    def start(self) -> None:
        """Start the processes if there are none; does not wait for them. Those of torchrun cannot be started again."""
        if self._crew is None:
            if self.place is not None and self._gone:
                raise Scail2Error("The processes that torchrun started have ended: start the command again.")
            self._crew, self._gone = Crew(self.size, self.device, self._opener, self.place), True
            atexit.register(self.end)  # threads of a crew must be over when the interpreter ends

    @property
    def processes(self) -> tuple[int, ...]:
        """Process ids of the others."""
        return () if self._crew is None else tuple(process.pid for process in self._crew.processes)

    @property
    def groups(self) -> Groups:
        """This process's groups, when all processes are ready."""
        return self._ready().groups

    def sharing(self, passes: int) -> Sharing:
        """`pipeline.sharing.Ranks`."""
        return self.groups.sharing(passes)

    @contextlib.contextmanager
    def together(self, name: str, *arguments: Any) -> Iterator[Groups]:
        """Every other process does `Worker.name(*arguments)` while this one does what is inside. Scail2Error when a
        process fails."""
        crew = self._ready()
        try:
            crew.in_call = True
            crew.call(name, *arguments)
            yield crew.groups
            crew.check()
        except BaseException as error:
            if told := crew.failure_behind(error):
                raise told from error
            raise
        crew.in_call = False

    def told(self, error: BaseException) -> BaseException:
        """What to raise for an error of a run: the failure of another process that is behind it, or the error."""
        crew = self._crew
        return error if crew is None else crew.failure_behind(error) or error

    @property
    def broken(self) -> bool:
        """Has a process died or failed, or was a call cut off?"""
        return self._crew is not None and (self._crew.in_call or self._crew.failure is not None)

    def settle(self) -> None:
        """Before a run, and after one that was ended from outside: processes of a broken team go."""
        if self.broken:
            self.end()

    def end(self) -> None:
        """End the processes at once; the next call starts new ones."""
        self._leave(Crew.end)

    def close(self) -> None:
        """Let the processes finish and end."""
        self._leave(Crew.close)

    def leads(self, transformer: Transformer) -> None:
        """Its recorded steps hold the groups: they go before these do."""
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
