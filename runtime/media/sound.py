"""Reads the audio of a part of a video as samples."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from scail2_rt.runtime.media import audio


@dataclass(frozen=True, slots=True, eq=False)
class Sound:
    """Audio samples, fp32 [channels, n] in -1..1, and their rate in samples per second."""

    samples: np.ndarray
    rate: int


def read_sound(path: Path, start_s: Fraction, duration_s: Fraction) -> Sound | None:
    """Read the first audio track that can be decoded, from `start_s` to `start_s + duration_s` seconds after the first
    video frame. Gaps, and the part after the end of the track, are silent. Returns None if the file has no such track;
    raises InputError if it cannot be opened."""
    known = audio.known_tracks(path)
    if not known:
        return None
    zero = audio.first_frame_s(path) + start_s
    with audio.open_audio(path) as container:
        stream = container.streams.audio[known[0]]
        rate, layout = stream.codec_context.sample_rate, stream.codec_context.layout
        samples = np.zeros((layout.nb_channels, round(duration_s * rate)), np.float32)
        for position, piece in audio.samples_of(container, stream, layout.name, rate, zero, duration_s):
            samples[:, position : position + piece.shape[1]] = piece
    return Sound(samples, rate)
