"""Small media files that the tests make for themselves with PyAV: videos of known colours, with clicks as audio."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

CLICK_EVERY_S = 0.25


def flat(colours: Sequence[tuple[int, int, int]], height: int = 48, width: int = 64) -> np.ndarray:
    """One flat frame per colour, uint8 [T, H, W, 3]."""
    return np.stack([np.full((height, width, 3), colour, np.uint8) for colour in colours])


def ramp(frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Grey frames whose level encodes their number: 8 levels per frame, starting at 8 (at most 30 frames)."""
    return flat([(8 * (i + 1),) * 3 for i in range(frames)], height, width)


def number_of(frame: np.ndarray) -> int:
    """The number of a frame of `ramp`, after lossy coding."""
    return round(float(frame.mean()) / 8) - 1


SCENE = {"top left": (220, 40, 30), "top right": (40, 200, 60), "bottom left": (50, 60, 210)}


def scene(frames: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Frames of four flat quarters: three colours show the orientation, a grey encodes the frame's number."""
    top, left = slice(0, height // 2), slice(0, width // 2)
    bottom, right = slice(height // 2, None), slice(width // 2, None)
    result = ramp(frames, height, width)
    result[:, top, left], result[:, top, right], result[:, bottom, left] = SCENE.values()
    assert np.array_equal(result[:, bottom, right], ramp(frames, height, width)[:, bottom, right])
    return result


def write_clip(
    path: Path,
    frames: np.ndarray,
    rate: Fraction | int = 25,
    *,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    pts: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    aspect: Fraction | None = None,
    transfer: int | None = None,
    audio: Sequence[tuple[str, int, str]] = (),
    audio_s: float | None = None,
    audio_from_s: float = 0,
) -> Path:
    """A video of RGB or RGBA frames, uint8 [T, H, W, 3 or 4].

    `audio`: (codec, sample rate, layout) of each track: a click every 0.25 s, as long as the video or `audio_s`, in a
    track that begins at `audio_from_s`.
    """
    with av.open(str(path), "w", options=container_options or {}) as out:
        stream = out.add_stream(codec, rate=rate, options={"crf": "10"} if options is None else options)
        context = stream.codec_context
        context.height, context.width = frames.shape[1:3]
        context.pix_fmt = pixel_format
        if time_base:
            context.time_base = stream.time_base = time_base
        if aspect:
            context.sample_aspect_ratio = aspect
        if transfer:
            context.color_trc = transfer
        tracks = [out.add_stream(name, rate=sample_rate, layout=layout) for name, sample_rate, layout in audio]
        for i, pixels in enumerate(frames):
            layout = "rgba" if pixels.shape[-1] == 4 else "rgb24"
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=layout).reformat(
                format=pixel_format
            )
            picture.pts = i if pts is None else pts[i]
            picture.time_base = time_base or 1 / Fraction(rate)
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
        for track in tracks:
            _write_clicks(out, track, audio_s or float(len(frames) / Fraction(rate)), audio_from_s)
    return path


def _write_clicks(out: av.container.OutputContainer, track: av.AudioStream, seconds: float, from_s: float) -> None:
    rate, layout = track.codec_context.sample_rate, track.codec_context.layout
    samples = np.zeros(int(seconds * rate), np.int16)
    for second in np.arange(0, seconds, CLICK_EVERY_S):
        samples[round(second * rate) :][:40] = 29000
    interleaved = np.repeat(samples[None], layout.nb_channels, 0).T.reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(interleaved), format="s16", layout=layout.name)
    frame.sample_rate, frame.pts, frame.time_base = rate, round(from_s * rate), Fraction(1, rate)
    resampler = av.AudioResampler(format=track.codec_context.format, layout=layout, rate=rate, frame_size=1024)
    for piece in [*resampler.resample(frame), *resampler.resample(None)]:
        out.mux(track.encode(piece))
    out.mux(track.encode(None))


def clicks_s(path: Path, track: int = 0) -> list[float]:
    """The times of the clicks of an audio track, in seconds after the first video frame."""
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        zero = float(frame.pts * frame.time_base)
    with av.open(str(path)) as container:
        stream = container.streams.audio[track]
        resampler = av.AudioResampler(format="flt", layout="mono", rate=stream.rate)
        times, samples = [], []
        for decoded in container.decode(stream):
            begin = float(decoded.pts * decoded.time_base)
            for piece in resampler.resample(decoded):
                values = np.abs(piece.to_ndarray()[0])
                times.append(begin + np.arange(len(values)) / stream.rate)
                samples.append(values)
    loud = np.concatenate(times)[np.concatenate(samples) > 0.25]
    starts = loud[np.concatenate([[True], np.diff(loud) > CLICK_EVERY_S / 2])]
    return (starts - zero).tolist()


def set_display_matrix(path: Path, a: int, b: int, c: int, d: int) -> None:
    """Writes the 2×2 part of the display matrix into an mp4's track header: (x, y) is shown at (ax + cy, bx + dy)."""
    data = bytearray(path.read_bytes())
    header = data.index(b"tkhd")
    (size,) = struct.unpack_from(">I", data, header - 4)
    matrix = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, header - 4 + size - 8 - 36, *matrix)
    path.write_bytes(data)


def set_avi_frames(path: Path, frames: int) -> None:
    """Writes another number of frames into the headers of an avi (the file's own and its first stream's)."""
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.index(b"avih") + 8 + 16, frames)
    struct.pack_into("<I", data, data.index(b"strh") + 8 + 32, frames)
    path.write_bytes(data)


def packet_at(path: Path, number: int, kind: str = "video") -> range:
    """The byte position of a packet of the first stream of this kind."""
    with av.open(str(path)) as container:
        (stream,) = container.streams.get({kind: 0})
        packet = [packet for packet in container.demux(stream) if packet.size][number]
        assert packet.pos is not None
        return range(packet.pos, packet.pos + packet.size)


def cut_in_packet(path: Path, number: int) -> None:
    """Truncates the file in the middle of a video packet, like an interrupted download."""
    place = packet_at(path, number)
    path.write_bytes(path.read_bytes()[: place[len(place) // 2]])


def overwrite(path: Path, place: range) -> None:
    """Overwrites a part of a file with random bytes."""
    data = bytearray(path.read_bytes())
    data[place.start : place.stop] = b"\xff" * len(place)
    path.write_bytes(data)
