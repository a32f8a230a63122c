"""A worker process: opens the engines once and runs one job after another.

    stdin    one JSON object per line: {"run": job}, {"cancel": job id}; the process exits at end of file
    stdout   {"ready": …}, then per job {"event": …}, {"preview": …} and one of done, failed, cancelled

Like the command line, a worker calls `Session.fit` and `Session.generate`, with `resume`, for an output in the job's
folder: a job that another process began continues after its last finished segment; for a complete one only the result
is sent. A worker exits when its server has ended.
"""

import base64
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from scail2_rt.kernels.ahead import start_early
from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.runtime.core.progress import Cancelled, Progress
from scail2_rt.runtime.core.request import Output
from scail2_rt.runtime.serve import made_masks
from scail2_rt.runtime.serve.check_process import facts_of, plain_names
from scail2_rt.runtime.session.output_lock import wait_for_lock

if TYPE_CHECKING:
    from scail2_rt.runtime.core.plan import Plan
    from scail2_rt.runtime.masks.make.make import Masks
    from scail2_rt.runtime.session.session import Session
    from scail2_rt.runtime.session.write import Result


class Messages:
    """Messages from and to the server. A thread reads stdin. jobs: jobs to run; cancel: set to cancel the current
    one."""

    def __init__(self, answers: IO[str]) -> None:
        self.jobs: queue.Queue[dict[str, Any]] = queue.Queue()
        self.cancel = threading.Event()
        self._answers, self._job, self._lock = answers, "", threading.Lock()
        threading.Thread(target=self._listen, daemon=True).start()

    def say(self, **message: Any) -> None:
        """Send one message to the server, as a JSON line."""
        with self._lock:
            print(json.dumps(message), file=self._answers, flush=True)

    def _listen(self) -> None:
        for line in sys.stdin:
            message = json.loads(line)
            if "run" in message:  # the previous job has ended
                self._job = message["run"]["id"]
                self.cancel.clear()
                self.jobs.put(message["run"])
            elif message.get("cancel") == self._job:
                self.cancel.set()
        os._exit(0)  # the server has ended


def open_session(settings: Mapping[str, Any]) -> "Session":
    """Open the engines with the operator's options. Raises Scail2Error if they cannot be opened."""
    from scail2_rt.engines.engine_set import Execution
    from scail2_rt.runtime.session.session import Session

    execution = Execution(
        settings["max_rows"], settings["attention"], not settings["no_graphs"], settings["vram_limit"]
    )
    shared = settings["gpus_per_video"]
    together: dict[str, Any] = {"gpus": shared} if shared > 1 else {}
    return Session.open(settings["engines"], backend=settings["backend"], execution=execution, **together)


def warm(session: "Session") -> None:
    """Run one step of a very small video, so that weights are loaded and kernels compiled before the first job."""
    import numpy as np

    from scail2_rt.runtime.core.request import Clip, Request

    white = np.full((96, 160, 3), 255, np.uint8)
    figure = white.copy()
    figure[16:80, 60:100] = (0, 0, 255)
    black = np.zeros_like(figure)
    black[16:80, 60:100] = (0, 0, 255)
    clip, mask = (Clip(np.stack([picture] * 5), Fraction(16)) for picture in (figure, black))
    request = Request(figure, figure, clip, mask, size=(96, 160), steps=1, guidance=1, fit="official")
    for _ in session.animate(session.check(request)):
        pass


def run(session: "Session", job: Mapping[str, Any], messages: Messages) -> None:
    """Run one job and send its result, failure or cancellation. Does not raise; the session can run the next job."""
    folder = Path(job["folder"])
    began = time.perf_counter()
    about = {"job": job["id"], "attempt": job["attempt"]}
    try:
        heard = Teller(messages, about, folder)
        masks = None
        if job["masking"] is not None:
            masks = made_masks.make(session, job, folder, heard, messages.cancel)
        if job["id"].startswith("masks_"):
            assert masks is not None
            told = {"characters": list(masks.characters), "notes": list(masks.notes), "mode": masks.mode}
            messages.say(done=told | {"inference_s": round(masks.seconds, 3), "frames": 0, "timings_s": {}}, **about)
            return
        plan = make_plan(session, job, folder, masks)
        messages.say(planned=facts_of(plan), **about)
        result = generate(session, plan, job, heard)
    except Cancelled:
        messages.say(cancelled=True, **about)
    except Exception as error:
        kind = "memory" if "memory ran out" in str(error) else "fault"
        kind = "input" if isinstance(error, InputError) else kind
        said = str(error) if isinstance(error, Scail2Error) else f"{type(error).__name__}: {error}"
        said = said.replace(f"{session.engines.directory}{os.sep}", "")  # clients do not see the operator's paths
        messages.say(failed={"message": plain_names(said, folder, job["masking"]), "kind": kind}, **about)
    else:
        messages.say(done=described(result, time.perf_counter() - began), **about)


def make_plan(session: "Session", job: Mapping[str, Any], folder: Path, masks: "Masks | None") -> "Plan":
    """The generation plan, with the hints of the command line. masks: masks made for this job, which set the mode."""
    from scail2_rt.runtime.jobs.run import fit_plan
    from scail2_rt.runtime.serve.fields import options_of, request_of
    from scail2_rt.runtime.serve.plans import planned

    options = dict(job["options"])
    if masks is not None:
        options["mode"] = masks.mode
    plan = planned(folder, request_of(options, folder, job["extra_refs"]))
    return fit_plan(plan, session, options_of(options, folder))


def generate(session: "Session", plan: "Plan", job: Mapping[str, Any], heard: "Teller") -> "Result":
    """Generate the video, resuming an earlier attempt. If that attempt's files do not fit (for example after an update
    of the program), start from the beginning."""
    given = job["options"]
    chosen = {"metadata": False} | {name: given[name] for name in ("codec", "crf", "metadata") if name in given}
    output = Output(Path(job["folder"]) / "video.mp4", **chosen, resume=True)
    wait_for_lock(output.path)
    try:
        return session.generate(plan, output, heard, heard.messages.cancel)
    except InputError:
        if job["attempt"] == 1 or heard.began:
            raise
        return session.generate(plan, Output(output.path, **chosen, overwrite=True), heard, heard.messages.cancel)


class Teller:
    """A progress listener that sends each event to the server, and a preview image per finished segment. began: an
    event has arrived."""

    def __init__(self, messages: Messages, about: Mapping[str, Any], folder: Path) -> None:
        self.messages, self.began = messages, False
        self._about, self._video, self._shown = about, folder / "video.mp4", 0

    def __call__(self, event: Progress) -> None:
        from scail2_rt.runtime.media.unfinished import partial_path, resumable
        from scail2_rt.runtime.serve.pictures import newest_picture

        self.began = True
        told = {name: getattr(event, name) for name in Progress.__slots__}
        finished = resumable(self._video) if event.segment > 1 else 0
        self.messages.say(event=told | {"finished": finished}, **self._about)
        if finished > self._shown:
            self._shown = finished
            picture = base64.b64encode(newest_picture(partial_path(self._video))).decode()
            self.messages.say(preview={"segment": finished, "jpeg": picture}, **self._about)


def described(result: "Result", seconds: float) -> dict[str, Any]:
    """The result of a completed job, as the store keeps it. seconds: wall time."""
    report = result.report
    return {
        "frames": result.frames,
        "timings_s": {name: round(value, 4) for name, value in result.timings.items()},
        "inference_s": round(seconds, 3),
        "memory": dict(report.get("memory", {})),
        "warnings": list(result.warnings),
        "resumed": result.resumed,
        "video_bytes": result.path.stat().st_size,
    }


def main() -> None:
    """`python -m scail2_rt.runtime.serve.worker SETTINGS`; SETTINGS is a JSON object."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print to stdout
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which ends its workers
    settings = json.loads(sys.argv[1])
    messages = Messages(answers)
    opened = stamp(settings)
    start_early(Path(settings["engines"]), settings["backend"])
    try:
        import torch

        if not torch.cuda.is_available():
            os.nice(5)  # the server's process has priority
        session = open_session(settings)
        if settings["warm"]:
            warm(session)
    except Scail2Error as error:
        messages.say(unusable=str(error))
        return
    hosting = session.engines.executor.backend.hosting
    messages.say(ready={"choice": session.choice, "hosting": hosting, "memory": memory()})
    while True:
        job = messages.jobs.get()
        if (now := stamp(settings)) != opened:
            session.close()
            try:
                session, opened = open_session(settings), now
            except Scail2Error as error:
                print(f"error: {error}", file=sys.stderr)
                said = "The engines of the service were changed and cannot be opened. Ask its operator."
                messages.say(failed={"message": said, "kind": "fault"}, job=job["id"], attempt=job["attempt"])
                return
        run(session, job, messages)
        messages.say(idle={"memory": memory()})


def stamp(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Inode and modification time (ns) of the engine folder's manifest, which change with a new build; None if there is
    no manifest."""
    try:
        found = (Path(settings["engines"]) / "manifest.json").stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def memory() -> dict[str, float]:
    """Peak memory of this process in GiB, by kind."""
    from scail2_rt.runtime.session.report import memory_peaks

    return memory_peaks()


if __name__ == "__main__":
    main()
