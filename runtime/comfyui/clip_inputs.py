"""What a graph gives as a moving picture and as sound, for a request, and the sound of the result.

A VIDEO that is a file is read from that file by our own reader, with its rotation and rate and a few frames at a time:
ComfyUI's would put the whole clip into memory as floats. Any other VIDEO, and a batch of images, is a tensor already.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.comfyui.frames import TensorFrames
from scail2_rt.runtime.core.request import Clip, ClipSource
from scail2_rt.runtime.media.sound import read_sound


@dataclass(frozen=True, slots=True, eq=False)
class Driving:
    """A driving clip. audio: ComfyUI's AUDIO of a clip in memory: waveform [1, channels, samples], sample_rate; the
    sound of a file is read with it."""

    source: ClipSource
    audio: Mapping[str, Any] | None = None


def driving_clip(given: Any, frame_rate: float, audio: Mapping[str, Any] | None = None) -> Driving:
    """A VIDEO, or images [T, H, W, 3] at `frame_rate`. audio: taken before the VIDEO's own. InputError for anything
    else."""
    if hasattr(given, "get_components"):
        if (path := file_of(given)) is not None:
            return Driving(path, audio)
        parts = given.get_components()
        frames = TensorFrames(parts.images, "driving video")
        return Driving(Clip(frames, parts.frame_rate, "driving video"), audio or parts.audio)
    if not hasattr(given, "ndim"):
        raise InputError(f"driving is a {type(given).__name__}: connect a VIDEO or images.")
    return Driving(Clip(TensorFrames(given, "driving images"), Fraction(frame_rate), "driving images"), audio)


def file_of(video: Any) -> Path | None:
    """The file that a VIDEO is, whole; None for one in memory, and for a part of a file."""
    from comfy_api.latest import InputImpl

    if not isinstance(video, InputImpl.VideoFromFile):
        return None
    window = getattr(video, "get_active_trim_window", None)  # ComfyUI 0.4 and newer can trim
    source = video.get_stream_source()
    return Path(source) if isinstance(source, str) and (window is None or not any(window())) else None


def sound_of(driving: Driving, start_s: Fraction, duration_s: Fraction) -> dict[str, Any] | None:
    """AUDIO of the result: what plays with its frames. None where there is none."""
    if driving.audio is None:
        if isinstance(driving.source, Clip):
            return None
        sound = read_sound(Path(driving.source), start_s, duration_s)
        return None if sound is None else {"waveform": _tensor(sound.samples)[None], "sample_rate": sound.rate}
    rate = int(driving.audio["sample_rate"])
    first, count = round(start_s * rate), round(duration_s * rate)
    return {"waveform": driving.audio["waveform"][..., first : first + count], "sample_rate": rate}


def _tensor(samples: Any) -> Any:
    import torch

    return torch.from_numpy(samples)
