"""The process that decodes uploads: it stays warm, and a child of it looks at one job's inputs.

    stdin    one JSON object per line: id, folder, options, limits
    stdout   one per answer: id and what the child found, or what it died of

A child's memory and time are limited, and it may write hardly anything; what it was given may break it and nothing
else. It runs what the command line runs before it loads anything (`session.check.check_request`), so that refusals are
the same sentences.
"""

import base64
import contextlib
import json
import os
import select
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.kernels.wording import counted
from scail2_rt.runtime.serve import made_masks

if TYPE_CHECKING:
    from scail2_rt.runtime.core.plan import Plan

ANSWER_BYTES = 2 << 20
SLACK_S = 2.0


@dataclass(slots=True)
class Child:
    """One check that runs. answer: read end of its pipe; said: what came so far."""

    id: str
    pid: int
    answer: int
    deadline: float
    limits: dict[str, Any]
    said: bytes = b""


def look(folder: Path, options: dict[str, Any], limits: dict[str, Any]) -> dict[str, Any]:
    """What a job's inputs are and would give. InputError as on the command line."""
    from scail2_rt.runtime.serve.fields import request_of
    from scail2_rt.runtime.serve.plans import pack
    from scail2_rt.runtime.session.check import check_request

    limit_sizes(folder, limits)
    options = dict(options)
    seconds, extra = options.pop("seconds", None), options.pop("extra_refs", 0)
    masking = options.pop("masking", None)
    if seconds is not None and options.get("frames") is None:
        rate = Fraction(options["fps"]) if "fps" in options else None
        options["frames"] = _frames_of(folder / "video_reference", Fraction(seconds), options.get("start", 0), rate)
    if masking is not None:
        return _limited(made_masks.look(folder, options, masking), limits) | {"asked_frames": options.get("frames")}
    plan = check_request(request_of(options, folder, extra))
    packed = base64.b64encode(pack(plan)).decode()
    return _limited(facts_of(plan), limits) | {"asked_frames": options.get("frames"), "plan": packed}


def facts_of(plan: "Plan") -> dict[str, Any]:
    """What the interface tells of a plan."""
    return {
        "frames": plan.frames,
        "height": plan.height,
        "width": plan.width,
        "frame_rate": str(plan.frame_rate),
        "segments": len(plan.segments),
        "mode": plan.mode,
        "warnings": list(plan.warnings),
        "framing": plan.framing.line if plan.framing is not None else "",
    }


def _limited(facts: dict[str, Any], limits: dict[str, Any]) -> dict[str, Any]:
    """The facts, if the video is one that this service makes."""
    if facts["frames"] > limits["frames"]:
        raise TooMuch(
            f"The video would have {counted(facts['frames'], 'frame')}; this service makes up to {limits['frames']}."
        )
    if facts["height"] * facts["width"] > limits["pixels"]:
        size = f"{facts['width']}x{facts['height']}"
        raise TooMuch(f"{size} has more pixels than the {limits['pixels']} that are made here.")
    return facts


class TooMuch(InputError):
    """Within what the program can do, and beyond what this service does."""


def limit_sizes(folder: Path, limits: dict[str, Any]) -> None:
    """Refuse pictures and clips whose headers name too many pixels, before anything of them is decoded."""
    import av
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # sizes are judged here
    for path in sorted(folder.iterdir()):
        width = height = 0
        with contextlib.suppress(Exception):  # what cannot be opened is told by the check, in its words
            if "video" in path.name:
                with av.open(str(path.absolute())) as container:
                    context = container.streams.video[0].codec_context
                    width, height = context.width, context.height
            else:
                with Image.open(path) as image:
                    width, height = image.size
        if width * height > limits["pixels"]:
            raise TooMuch(f"{path.name} has {width}x{height} pixels, more than the {limits['pixels']} that are read.")


def _frames_of(path: Path, seconds: Fraction, start: int, rate: Fraction | None) -> int:
    """How many frames of a clip, at its own rate or another one, make so many seconds; at most what it has."""
    from scail2_rt.runtime.media.clips import nearest_frames, probe

    info = probe(path)
    total = info.frames if rate is None else len(nearest_frames(info, rate))
    return max(1, min(round(seconds * (rate or info.frame_rate)), total - start))


def answer_of(folder: Path, options: dict[str, Any], limits: dict[str, Any]) -> dict[str, Any]:
    """What the child says: facts, or one sentence with names instead of paths."""
    try:
        return {"facts": look(folder, options, limits)}
    except MemoryError:
        return {"error": _too_big(limits), "status": 422}
    except Scail2Error as error:
        if "Cannot allocate memory" in str(error) or isinstance(error.__cause__, MemoryError):
            return {"error": _too_big(limits), "status": 422}
        said = plain_names(str(error), folder, options.get("masking"))
        return {"error": said, "status": 422 if isinstance(error, TooMuch) else 400}
    except Exception as error:
        said = plain_names(f"{type(error).__name__}: {error}", folder)
        return {"error": f"The inputs cannot be used ({said[:300]}).", "status": 400}


def plain_names(sentence: str, folder: Path, masking: Mapping[str, Any] | None = None) -> str:
    """A sentence without the path of the job's folder: what it calls files are the fields of the interface. masking:
    the job's, whose segmenter's folder is the operator's."""
    if masking and masking.get("weights"):
        sentence = sentence.replace(str(masking["weights"]), "The segmenter of this service")
    return " ".join(sentence.replace(f"{folder}{os.sep}", "").split())


def _too_big(limits: dict[str, Any]) -> str:
    gib = limits["decode_bytes"] / 2**30
    return f"The inputs need more than the {gib:.1f} GiB that checking them may take: send smaller ones."


def _confine(limits: dict[str, Any]) -> None:
    """Memory beyond what is there already, time, nearly no files, no core."""
    import resource

    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * os.sysconf("SC_PAGE_SIZE") + int(limits["decode_bytes"])
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    seconds = int(limits["decode_s"]) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds * 2, seconds * 2))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def start(call: dict[str, Any]) -> Child:
    """Fork a child for one check."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            os.close(0)
            _confine(call["limits"])
            reply = json.dumps(answer_of(Path(call["folder"]), call["options"], call["limits"]))
            view = memoryview(reply.encode())
            while view:
                view = view[os.write(write, view) :]
        finally:
            os._exit(0)
    os.close(write)
    return Child(call["id"], pid, read, time.monotonic() + call["limits"]["decode_s"], call["limits"])


def finish(child: Child) -> dict[str, Any]:
    """The answer of a child that has closed its pipe, or what it died of."""
    os.close(child.answer)
    _, status = os.waitpid(child.pid, 0)
    with contextlib.suppress(ValueError):
        return {"id": child.id, **json.loads(child.said)}
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXCPU):
        limit = f"{child.limits['decode_s']:g} s"
        return {"id": child.id, "status": 422, "error": f"Checking the inputs takes longer than {limit}: send less."}
    return {"id": child.id, "status": 422, "error": f"The inputs broke the decoder ({status}): encode them again."}


def serve() -> None:
    """Fork a child per call, until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _preload()
    children: dict[int, Child] = {}
    unread = b""
    while True:
        wait_s = min((child.deadline - time.monotonic() for child in children.values()), default=None)
        ready, _, _ = select.select([0, *children], [], [], wait_s if wait_s is None else max(wait_s, 0.0))
        for fd in ready:
            data = os.read(fd, 1 << 16)
            if fd == 0:
                if not data:
                    for child in children.values():
                        os.kill(child.pid, signal.SIGKILL)
                    return
                *lines, unread = (unread + data).split(b"\n")
                for line in lines:
                    child = start(json.loads(line))
                    children[child.answer] = child
                continue
            child = children[fd]
            child.said += data
            if not data or len(child.said) > ANSWER_BYTES:
                print(json.dumps(finish(children.pop(fd))), file=answers, flush=True)
        for child in children.values():
            if time.monotonic() > child.deadline:
                child.deadline += SLACK_S
                os.kill(child.pid, signal.SIGKILL)


def _preload() -> None:
    """What a check imports."""
    import av  # noqa: F401
    import PIL.Image

    import scail2_rt.runtime.masks.lint
    import scail2_rt.runtime.masks.windows
    import scail2_rt.runtime.media.clips
    import scail2_rt.runtime.pipeline.text
    import scail2_rt.runtime.serve.fields
    import scail2_rt.runtime.serve.plans
    import scail2_rt.runtime.session.check  # noqa: F401

    PIL.Image.init()


if __name__ == "__main__":
    serve()
