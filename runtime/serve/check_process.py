"""The process that decodes uploads. It imports everything once and forks one child per check.

    stdin    one JSON object per line: id, folder, options, limits
    stdout   one JSON object per line: id and facts, or id, error and status

A child has limits for memory, time and the size of written files, so a malicious upload can crash only its child. A
child runs the checks that the command line runs before it loads weights (`session.check.check_request`), so both print
the same error sentences.
"""

import base64
import contextlib
import json
import os
import select
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    """A running check. answer: read end of its pipe; deadline: on `time.monotonic`; said: bytes received so far."""

    id: str
    pid: int
    answer: int
    deadline: float
    limits: dict[str, Any]
    said: bytes = b""


def look(folder: Path, options: dict[str, Any], limits: dict[str, Any]) -> dict[str, Any]:
    """Check a job's inputs and return the facts of its plan, the packed plan and the requested frames. Raises
    InputError with the sentence of the command line."""
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
    plan = _placeless(check_request(request_of(options, folder, extra)), folder)
    packed = base64.b64encode(pack(plan)).decode()
    return _limited(facts_of(plan), limits) | {"asked_frames": options.get("frames"), "plan": packed}


def _placeless(plan: "Plan", folder: Path) -> "Plan":
    """The plan with field names instead of paths in its sentences, since later jobs with the same files use it too."""

    def plain(said: str) -> str:
        return plain_names(said, folder)

    masks = tuple(replace(f, file=plain(f.file), says=plain(f.says), remedy=plain(f.remedy)) for f in plan.masks)
    return replace(plan, warnings=tuple(map(plain, plan.warnings)), masks=masks)


def facts_of(plan: "Plan") -> dict[str, Any]:
    """The entries of a plan that the interface shows."""
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
    """Return the facts. Raises TooMuch if the video exceeds the limits of the service."""
    if facts["frames"] > limits["frames"]:
        raise TooMuch(
            f"The video would have {counted(facts['frames'], 'frame')}; this service makes up to {limits['frames']}. "
            "Ask for fewer frames."
        )
    if facts["height"] * facts["width"] > limits["pixels"]:
        size = f"{facts['width']}x{facts['height']}"
        raise TooMuch(f"{size} has more pixels than this service makes ({limits['pixels']}). Ask for a smaller size.")
    return facts


class TooMuch(InputError):
    """The request is valid but exceeds a limit of this service."""


def limit_sizes(folder: Path, limits: dict[str, Any]) -> None:
    """Read the frame size from the header of each input, before anything is decoded. Raises TooMuch for a size above
    `limits["pixels"]`."""
    import av
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # this function checks the sizes
    for path in sorted(folder.iterdir()):
        width = height = 0
        with contextlib.suppress(Exception):  # check_request reports files that cannot be opened
            if "video" in path.name:
                with av.open(str(path.absolute())) as container:
                    context = container.streams.video[0].codec_context
                    width, height = context.width, context.height
            else:
                with Image.open(path) as image:
                    width, height = image.size
        if width * height > limits["pixels"]:
            most = limits["pixels"]
            raise TooMuch(f"{path.name} has {width}x{height} pixels; this service reads up to {most}. Scale it down.")


def _frames_of(path: Path, seconds: Fraction, start: int, rate: Fraction | None) -> int:
    """The number of frames in `seconds` of a clip at its own rate or at `rate`, at most the frames that follow
    `start`."""
    from scail2_rt.runtime.media.clips import nearest_frames, probe

    info = probe(path)
    total = info.frames if rate is None else len(nearest_frames(info, rate))
    return max(1, min(round(seconds * (rate or info.frame_rate)), total - start))


def answer_of(folder: Path, options: dict[str, Any], limits: dict[str, Any]) -> dict[str, Any]:
    """The child's answer: the facts, or an error sentence that contains field names instead of paths."""
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
        return {"error": f"The inputs cannot be used ({said[:300]}). Encode them again.", "status": 400}


def plain_names(sentence: str, folder: Path, masking: Mapping[str, Any] | None = None) -> str:
    """Remove the path of the job's folder from a sentence; the remaining file names are the interface's field names.
    masking: the job's masking options; the path of the segmenter's folder is replaced too."""
    if masking and masking.get("weights"):
        sentence = sentence.replace(str(masking["weights"]), "The segmenter of this service")
    return " ".join(sentence.replace(f"{folder}{os.sep}", "").split())


def _too_big(limits: dict[str, Any]) -> str:
    gib = limits["decode_bytes"] / 2**30
    return f"Checking the inputs needs more than {gib:.1f} GiB of memory. Send smaller ones."


def _confine(limits: dict[str, Any]) -> None:
    """Limit this process: `decode_bytes` of further memory, CPU time, 1 MiB per written file, no core dump."""
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
    """The answer of a child that has closed its pipe, or an error that names the cause of its death."""
    os.close(child.answer)
    _, status = os.waitpid(child.pid, 0)
    with contextlib.suppress(ValueError):
        return {"id": child.id, **json.loads(child.said)}
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXCPU):
        limit = f"{child.limits['decode_s']:g} s"
        sentence = f"Checking the inputs takes longer than {limit}. Send shorter or smaller ones."
        return {"id": child.id, "status": 422, "error": sentence}
    return {"id": child.id, "status": 422, "error": f"The inputs crashed the decoder ({status}). Encode them again."}


def serve() -> None:
    """Fork one child per line of stdin, until stdin ends."""
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
    """Import the modules that a check needs."""
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
