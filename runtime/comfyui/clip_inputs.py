"""Convert the graph's driving clip and audio for a request, and make the audio of the result.

A VIDEO that is a complete file is read by this package's reader, a few frames at a time, with its rotation and rate:
ComfyUI's reader would load the clip into memory as floats. Any other VIDEO, and a batch of images, is a tensor already.
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
    """A driving clip. audio: ComfyUI's AUDIO, a dict of waveform float [1, channels, samples] and sample_rate in Hz;
    None: the audio of the file, if the clip is one."""

    source: ClipSource
    audio: Mapping[str, Any] | None = None


def driving_clip(given: Any, frame_rate: float, audio: Mapping[str, Any] | None = None) -> Driving:
    """The driving clip from a VIDEO, or from images float [T, H, W, 3] at `frame_rate` (frames per second). audio:
    replaces the VIDEO's audio. Raises InputError for other types."""
    if hasattr(given, "get_components"):
        if (path := file_of(given)) is not None:
            return Driving(path, audio)
        parts = given.get_components()
        frames = TensorFrames(parts.images, "driving clip")
        return Driving(Clip(frames, parts.frame_rate, "driving clip"), audio or parts.audio)
    if not hasattr(given, "ndim"):
        raise InputError(f"driving is a {type(given).__name__}. Connect a VIDEO or images.")
    return Driving(Clip(TensorFrames(given, "driving images"), Fraction(frame_rate), "driving images"), audio)


def file_of(video: Any) -> Path | None:
    """The path of a VIDEO that is a complete file; None for one in memory or a trimmed one."""
    from comfy_api.latest import InputImpl

    if not isinstance(video, InputImpl.VideoFromFile):
        return None
    window = getattr(video, "get_active_trim_window", None)  # ComfyUI 0.4 and newer can trim
    source = video.get_stream_source()
    return Path(source) if isinstance(source, str) and (window is None or not any(window())) else None


def sound_of(driving: Driving, start_s: Fraction, duration_s: Fraction) -> dict[str, Any] | None:
    """The AUDIO that belongs to the frames of the result; None if the driving clip has none. start_s, duration_s:
    seconds of the driving clip."""
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
