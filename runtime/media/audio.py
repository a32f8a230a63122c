"""The driving video's audio in the result, and the final file.

Every audio track that can be decoded is kept. In mp4 and mov, a track whose codec players of that format read is
copied, packet by packet, untouched; any other is encoded to AAC, where a damaged packet becomes silence. The cut at the
start is exact to the sample either way: of a copied track, packets up to `_PREROLL_S` before it are kept with negative
times, which mp4 stores as an edit list (the decoder needs them to warm up, the player does not play them); of an
encoded track, samples are cut. Matroska and WebM hold no negative times, so every track is encoded, to Opus, and keeps
the exact cut. The end is exact as the track's stated duration; the data of the last packet may run over it (by about
20 ms at most).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.containers import container_of
from scail2_rt.runtime.core.warnings import warn

_COPIED = {  # container: codecs
    "mp4": frozenset({"aac", "mp3", "ac3", "eac3", "alac", "opus", "flac"}),
    "mov": frozenset({"aac", "mp3", "ac3", "eac3", "alac"}),
}
_PREROLL_S = Fraction(1, 10)  # Opus wants 80 ms, AAC one or two packets, MP3 a few
_AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
_BIT_RATE = 192_000
_OPUS_RATE = 48_000
_FRAME_SAMPLES = {"aac": 1024, "libopus": 960}  # of one packet
_GAP_S = Fraction(1, 100)  # less is the rounding of a container's times

_Timed = tuple[Fraction, Any]  # seconds in the result, packet


def open_audio(path: Path) -> Any:
    """The opened container; `InputError` when it cannot be opened. It may hold no audio: then the result has none."""
    try:
        return av.open(str(path.absolute()))  # absolute: FFmpeg takes what precedes a colon for a protocol
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"The audio of {path} cannot be read ({error}): re-encode the file.") from error


def remux(
    video: Path,
    target: Path,
    frame_rate: Fraction,
    ticks: int,
    end_s: Fraction,
    audio_from: Path | None,
    start_s: Fraction = Fraction(0),
    comment: str | None = None,
) -> None:
    """Writes `target` (mp4 and mov with the index in front) from the encoded `video`, copied, and the audio of
    `audio_from` between `start_s` and `start_s + end_s` seconds after that file's first video frame. `ticks` per second
    is the video track's timescale, `end_s` the video's exact duration, `frame_rate` what Matroska states beside the
    times, `comment` the text of the tag of that name."""
    kind = container_of(target).muxer
    options = {"fflags": "+bitexact"}  # else Matroska writes random numbers
    if mp4 := kind in ("mp4", "mov"):
        options = {"movflags": "+faststart", "video_track_timescale": str(ticks)}
    if kind == "mov":
        options["movflags"] += "+use_metadata_tags"  # QuickTime's older tag ends at 64 KiB
    with ExitStack() as stack:
        source = stack.enter_context(av.open(str(video.absolute())))
        out = stack.enter_context(av.open(str(target.absolute()), "w", format=kind, options=options))
        if comment is not None:
            out.metadata["comment"] = comment
        picture = source.streams.video[0]
        copy = out.add_stream_from_template(picture, opaque=True)  # by codec: an AV1 decoder has no encoder of its name
        if mp4:
            copy.codec_context.codec_tag = picture.codec_context.codec_tag
            copy.time_base = Fraction(1, ticks)
        else:
            copy.codec_context.framerate = frame_rate
        tracks: list[Iterator[_Timed]] = [_video_packets(source, picture, copy, end_s)]
        if audio_from is not None:
            zero = first_frame_s(audio_from) + start_s
            for index in known_tracks(audio_from):  # a container of its own for each, so that they can be read in step
                container = stack.enter_context(open_audio(audio_from))
                stream = container.streams.audio[index]
                if mp4 and stream.codec_context.codec.canonical_name in _COPIED[kind]:
                    copy = out.add_stream_from_template(stream)
                    tracks.append(_copied(container, stream, copy, zero, end_s))
                else:
                    tracks.append(_encoded(container, stream, _add_track(stream, out, mp4), zero, end_s))
        for _, packet in heapq.merge(*tracks, key=lambda timed: timed[0]):
            out.mux(packet)


def known_tracks(path: Path) -> list[int]:
    """Numbers of the audio tracks whose codec is known here (`probe_video` warns of the others)."""
    with open_audio(path) as container:
        return [i for i, track in enumerate(container.streams.audio) if track.codec_context is not None]


def first_frame_s(path: Path) -> Fraction:
    """Presentation time of the first video frame of a file in its own timeline, in seconds (0 without video).

    An avi has no such times, it shows its n-th frame at n / rate; FFmpeg's guess is late by the decoder's delay."""
    with open_audio(path) as container:
        stream = container.streams.best("video")
        if stream is None:
            return Fraction(0)
        if container.format.name == "avi":
            return (stream.start_time or 0) * stream.time_base
        frame = next(container.decode(stream), None)
        return frame.pts * frame.time_base if frame is not None and frame.pts is not None else Fraction(0)


def _video_packets(container: Any, stream: Any, copy: Any, end_s: Fraction) -> Iterator[_Timed]:
    previous = None
    for packet in container.demux(stream):
        if previous is not None:
            if packet.dts is None:
                previous.duration = round(end_s / previous.time_base) - previous.pts
            previous.stream = copy
            yield previous.pts * stream.time_base, previous
        previous = packet if packet.dts is not None else None


def _copied(container: Any, stream: Any, copy: Any, zero: Fraction, end_s: Fraction) -> Iterator[_Timed]:
    """Times are counted in samples: a container's own unit may be a whole packet (AVI), too coarse for the cut."""
    unit = Fraction(1, stream.codec_context.sample_rate or 48_000)
    timeline, previous = _Timeline(unit.denominator), None
    for packet in container.demux(stream):
        if packet.pts is None or packet.is_corrupt:  # of a file cut short, the last one
            continue
        duration = round((packet.duration or 0) * stream.time_base / unit)
        packet.pts = timeline.place(round((packet.pts * stream.time_base - zero) / unit), duration)
        packet.dts, packet.duration, packet.time_base = packet.pts, duration, unit
        begin = packet.pts * unit
        if begin >= end_s:
            return
        repeats = previous is not None and packet.pts <= previous  # no container takes it
        if begin + duration * unit > -_PREROLL_S and not repeats:
            previous = packet.pts
            _end_at(packet, end_s)
            packet.stream = copy
            yield begin, packet


class _Timeline:
    """Times of a track in samples. Where they fall back by more than a second, as in transport streams that were joined
    end to end, they go on behind what was there, as the frames do."""

    def __init__(self, rate: int) -> None:
        self._rate, self._shift = rate, 0
        self._end: int | None = None

    def place(self, position: int, length: int) -> int:
        if self._end is not None and position + self._shift < self._end - self._rate:
            self._shift = self._end - position
        self._end = position + self._shift + length
        return position + self._shift


def _end_at(packet: Any, end_s: Fraction) -> None:
    """Shortens a packet that would play beyond the end; its data stays whole."""
    packet.duration = min(packet.duration or 0, round(end_s / packet.time_base) - packet.pts)


def _add_track(stream: Any, out: Any, aac: bool) -> Any:
    """An AAC or Opus track for the decoded `stream`, of a sample rate and layout that the codec can hold."""
    rate = stream.codec_context.sample_rate if aac else _OPUS_RATE
    rate = rate if rate in _AAC_RATES else next((r for r in reversed(_AAC_RATES) if r >= rate), 48000)
    layout = {1: "mono", 2: "stereo", 6: "5.1"}.get(stream.codec_context.channels, "stereo")
    track = out.add_stream("aac" if aac else "libopus", rate=rate, layout=layout)
    track.codec_context.bit_rate = _BIT_RATE
    track.codec_context.time_base = track.time_base = Fraction(1, rate)
    return track


def _encoded(container: Any, stream: Any, track: Any, zero: Fraction, end_s: Fraction) -> Iterator[_Timed]:
    rate, layout = track.codec_context.sample_rate, track.codec_context.layout.name

    def packets(frame: Any) -> Iterator[_Timed]:
        for packet in track.encode(frame):
            _end_at(packet, end_s)
            yield packet.pts * packet.time_base, packet

    pieces = samples_of(container, stream, layout, rate, zero, end_s)
    for position, samples in _blocks(pieces, int(_GAP_S * rate), _FRAME_SAMPLES[track.codec_context.name]):
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, position, Fraction(1, rate)
        yield from packets(frame)
    yield from packets(None)


def samples_of(
    container: Any, stream: Any, layout: str, rate: int, zero: Fraction, end_s: Fraction
) -> Iterator[tuple[int, np.ndarray]]:
    """(position, samples fp32 [channels, n]) pieces of a track, resampled, between `zero` and `zero + end_s` seconds of
    its file; position counts from `zero`. Pieces may leave gaps, and overlap."""
    frames = _resampled(_decoded(container, stream), layout, rate)
    return _samples(frames, round(zero * rate), round(end_s * rate))


def _samples(frames: Iterator[Any], first: int, total: int) -> Iterator[tuple[int, np.ndarray]]:
    """(position, samples [channels, n]) pieces of the resampled track within 0 ≤ position < total."""
    timeline: _Timeline | None = None
    for frame in frames:
        timeline = timeline or _Timeline(frame.sample_rate)
        time = round(frame.pts * frame.time_base * frame.sample_rate)
        position = timeline.place(time, frame.samples) - first
        skip, stop = max(0, -position), min(frame.samples, total - position)
        if stop > skip:
            yield position + skip, frame.to_ndarray()[:, skip:stop]


def _resampled(frames: Iterator[Any], layout: str, rate: int) -> Iterator[Any]:
    """The frames as fltp. A track may change its rate or layout on the way (broadcasts do); a resampler cannot."""
    resampler, kind = None, None
    for frame in frames:
        if resampler is None or kind != (frame.format.name, frame.layout.name, frame.sample_rate):
            if resampler is not None:
                yield from resampler.resample(None)
            kind = (frame.format.name, frame.layout.name, frame.sample_rate)
            resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate)
        yield from resampler.resample(frame)
    if resampler is not None:
        yield from resampler.resample(None)


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """The track's frames. For a packet that cannot be decoded there is silence as long as the frame before it, so that
    what follows keeps its time."""
    last, lost = None, 0
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.FFmpegError:
            lost += 1
            frames = [] if last is None else [_silence_after(last)]
        for last in frames:
            yield last
    if lost:
        warn(f"{container.name}: {lost} damaged audio packets were replaced by silence.")


def _silence_after(frame: Any) -> Any:
    silent = av.AudioFrame(frame.format.name, frame.layout.name, frame.samples)
    for plane in silent.planes:
        plane.update(bytes(plane.buffer_size))
    silent.sample_rate, silent.time_base = frame.sample_rate, frame.time_base
    silent.pts = frame.pts + round(frame.samples / (frame.sample_rate * frame.time_base))
    return silent


def _blocks(pieces: Iterator[tuple[int, np.ndarray]], tolerance: int, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """The same samples in pieces of `size`, the last one shorter. Gaps of more than `tolerance`
    samples are filled with silence and longer overlaps cut, so that no error adds up."""
    begin, held = 0, None
    for position, samples in pieces:
        if held is None:
            begin, held = position, samples
        else:
            gap = position - begin - held.shape[1]
            silence = np.zeros((len(held), gap if gap > tolerance else 0), held.dtype)
            held = np.concatenate([held, silence, samples[:, -gap if gap < -tolerance else 0 :]], axis=1)
        while held.shape[1] >= size:
            yield begin, held[:, :size]
            begin, held = begin + size, held[:, size:]
    if held is not None and held.shape[1]:
        yield begin, held
