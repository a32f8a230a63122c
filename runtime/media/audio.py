"""Copies or encodes the driving clip's audio, and writes the final file.

All audio tracks that can be decoded are kept. In mp4 and mov, a track is copied packet by packet if players of that
format support its codec. Other tracks are encoded to AAC, and damaged packets become silence. The cut at the start is
exact to the sample in both cases. In a copied track, packets up to `_PREROLL_S` before the cut are kept with negative
times, which mp4 stores as an edit list: the decoder needs them to start up, and players do not play them. In an encoded
track, samples are cut. Matroska and WebM cannot store negative times, so all tracks are encoded, to Opus. At the end,
the track's stated duration is exact, but the data of the last packet may exceed it by up to about 20 ms.
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
from scail2_rt.kernels.wording import counted
from scail2_rt.runtime.core.containers import container_of
from scail2_rt.runtime.core.warnings import warn

_COPIED = {  # container: codecs
    "mp4": frozenset({"aac", "mp3", "ac3", "eac3", "alac", "opus", "flac"}),
    "mov": frozenset({"aac", "mp3", "ac3", "eac3", "alac"}),
}
_PREROLL_S = Fraction(1, 10)  # Opus needs 80 ms, AAC one or two packets, MP3 a few
_AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
_BIT_RATE = 192_000
_OPUS_RATE = 48_000
_FRAME_SAMPLES = {"aac": 1024, "libopus": 960}  # samples per packet
_GAP_S = Fraction(1, 100)  # shorter gaps are rounding errors of the container's times

_Timed = tuple[Fraction, Any]  # seconds in the result, packet


def open_audio(path: Path) -> Any:
    """Open a file that may hold audio. Raises InputError if it cannot be opened."""
    try:
        return av.open(str(path.absolute()))  # absolute: FFmpeg reads text before a colon as a protocol
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
    """Write `target` from the encoded `video`, which is copied, and the audio of `audio_from`. In mp4 and mov the index
    precedes the data.

    frame_rate   the rate that Matroska states in addition to the frames' times
    ticks        per second: timescale of the video track
    end_s        exact duration of the video in seconds
    start_s      the audio starts this many seconds after the first video frame of `audio_from`
    comment      text of the metadata tag `comment`

    Raises InputError if `audio_from` cannot be opened, and av.FFmpegError or OSError if writing fails."""
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
        copy = out.add_stream_from_template(picture, opaque=True)  # opaque: no encoder has the name of the AV1 decoder
        if mp4:
            copy.codec_context.codec_tag = picture.codec_context.codec_tag
            copy.time_base = Fraction(1, ticks)
        else:
            copy.codec_context.framerate = frame_rate
        tracks: list[Iterator[_Timed]] = [_video_packets(source, picture, copy, end_s)]
        if audio_from is not None:
            zero = first_frame_s(audio_from) + start_s
            for index in known_tracks(audio_from):  # a separate container per track, because they are read alternately
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
    """Numbers of the audio tracks that can be decoded; `probe_video` warns of the others. Raises InputError if the file
    cannot be opened."""
    with open_audio(path) as container:
        return [i for i, track in enumerate(container.streams.audio) if track.codec_context is not None]


def first_frame_s(path: Path) -> Fraction:
    """Presentation time of a file's first video frame in seconds; 0 without video. Raises InputError if the file cannot
    be opened.

    An AVI file stores no presentation times: frame n is shown at n / rate. FFmpeg's estimate is late by the delay of
    the decoder."""
    with open_audio(path) as container:
        stream = container.streams.best("video")
        if stream is None:
            return Fraction(0)
        if container.format.name == "avi":
            return (stream.start_time or 0) * stream.time_base
        frame = next(container.decode(stream), None)
        return frame.pts * frame.time_base if frame is not None and frame.pts is not None else Fraction(0)


def _video_packets(container: Any, stream: Any, copy: Any, end_s: Fraction) -> Iterator[_Timed]:
    """The packets of the video, for the stream `copy`. The last one is shown until `end_s`."""
    previous = None
    for packet in container.demux(stream):
        if previous is not None:
            if packet.dts is None:
                previous.duration = round(end_s / previous.time_base) - previous.pts
            previous.stream = copy
            yield previous.pts * stream.time_base, previous
        previous = packet if packet.dts is not None else None


def _copied(container: Any, stream: Any, copy: Any, zero: Fraction, end_s: Fraction) -> Iterator[_Timed]:
    """Packets of a track for the stream `copy`, with times from `zero` to `end_s` seconds after it.

    Times are in samples, because a container's unit may be one packet (AVI), which is too coarse for the cut."""
    unit = Fraction(1, stream.codec_context.sample_rate or 48_000)
    timeline, previous = _Timeline(unit.denominator), None
    for packet in container.demux(stream):
        if packet.pts is None or packet.is_corrupt:  # the last packet of a truncated file
            continue
        duration = round((packet.duration or 0) * stream.time_base / unit)
        packet.pts = timeline.place(round((packet.pts * stream.time_base - zero) / unit), duration)
        packet.dts, packet.duration, packet.time_base = packet.pts, duration, unit
        begin = packet.pts * unit
        if begin >= end_s:
            return
        repeats = previous is not None and packet.pts <= previous  # no format accepts equal times
        if begin + duration * unit > -_PREROLL_S and not repeats:
            previous = packet.pts
            _end_at(packet, end_s)
            packet.stream = copy
            yield begin, packet


class _Timeline:
    """Makes the times of a track continuous, in samples. If they jump back by more than a second, as in concatenated
    transport streams, later pieces follow the end of the earlier ones, as video frames do."""

    def __init__(self, rate: int) -> None:
        self._rate, self._shift = rate, 0
        self._end: int | None = None

    def place(self, position: int, length: int) -> int:
        """The continuous time of a piece of `length` samples at the stored time `position`."""
        if self._end is not None and position + self._shift < self._end - self._rate:
            self._shift = self._end - position
        self._end = position + self._shift + length
        return position + self._shift


def _end_at(packet: Any, end_s: Fraction) -> None:
    """Shorten the duration of a packet that exceeds the end; its data is not changed."""
    packet.duration = min(packet.duration or 0, round(end_s / packet.time_base) - packet.pts)


def _add_track(stream: Any, out: Any, aac: bool) -> Any:
    """Add an AAC or Opus track for `stream`, with a sample rate and channel layout that the codec supports."""
    rate = stream.codec_context.sample_rate if aac else _OPUS_RATE
    rate = rate if rate in _AAC_RATES else next((r for r in reversed(_AAC_RATES) if r >= rate), 48000)
    layout = {1: "mono", 2: "stereo", 6: "5.1"}.get(stream.codec_context.channels, "stereo")
    track = out.add_stream("aac" if aac else "libopus", rate=rate, layout=layout)
    track.codec_context.bit_rate = _BIT_RATE
    track.codec_context.time_base = track.time_base = Fraction(1, rate)
    return track


def _encoded(container: Any, stream: Any, track: Any, zero: Fraction, end_s: Fraction) -> Iterator[_Timed]:
    """Packets of a track encoded for the stream `track`, from `zero` to `end_s` seconds after it."""
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
    """Decode and resample the part of a track between `zero` and `zero + end_s` seconds of its file.

    Yields (position, samples): position in samples from `zero`, samples fp32 [channels, n]. Pieces may overlap or leave
    gaps."""
    frames = _resampled(_decoded(container, stream), layout, rate)
    return _samples(frames, round(zero * rate), round(end_s * rate))


def _samples(frames: Iterator[Any], first: int, total: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (position, samples [channels, n]) with 0 ≤ position < total; position 0 is sample `first` of the track."""
    timeline: _Timeline | None = None
    for frame in frames:
        timeline = timeline or _Timeline(frame.sample_rate)
        time = round(frame.pts * frame.time_base * frame.sample_rate)
        position = timeline.place(time, frame.samples) - first
        skip, stop = max(0, -position), min(frame.samples, total - position)
        if stop > skip:
            yield position + skip, frame.to_ndarray()[:, skip:stop]


def _resampled(frames: Iterator[Any], layout: str, rate: int) -> Iterator[Any]:
    """Resample frames to `rate` and `layout` in planar floats. A track may change its rate or layout in the middle, as
    broadcasts do, so each change starts a new resampler."""
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
    """The frames of a track. A packet that cannot be decoded becomes silence of the length of the previous frame, so
    that later frames keep their times."""
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
        warn(f"Silence replaces {counted(lost, 'damaged audio packet')} of {container.name}.")


def _silence_after(frame: Any) -> Any:
    """A silent frame of the format and length of `frame`, timed after it."""
    silent = av.AudioFrame(frame.format.name, frame.layout.name, frame.samples)
    for plane in silent.planes:
        plane.update(bytes(plane.buffer_size))
    silent.sample_rate, silent.time_base = frame.sample_rate, frame.time_base
    silent.pts = frame.pts + round(frame.samples / (frame.sample_rate * frame.time_base))
    return silent


def _blocks(pieces: Iterator[tuple[int, np.ndarray]], tolerance: int, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Regroup pieces into blocks of `size` samples; the last may be shorter. Gaps and overlaps of more than `tolerance`
    samples are filled with silence or cut, so that errors do not add up."""
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
