"""Outputs that are made frame by frame from a lossless video: a GIF, and a folder of PNG files.

A GIF has one palette per clip: FFmpeg's `palettegen` chooses 255 colours over all frames, `paletteuse` dithers to them.
Its times are whole hundredths of a second, and players slow down frames shorter than two; frames that would be shorter
are left out. Neither kind holds audio.
"""

import os
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.filter import Graph

from scail2_rt.runtime.core.warnings import warn

_CENTISECOND = Fraction(1, 100)
_SHORTEST = 2  # hundredths of a second


def write_images(video: Path, folder: Path, comment: str | None = None) -> None:
    """The frames of a video as `folder/000000.png`, …; `comment` is stored in each of them (PNG's iTXt)."""
    from PIL.PngImagePlugin import PngInfo

    remove(folder)
    folder.mkdir()
    about = PngInfo()
    if comment is not None:
        about.add_itxt("comment", comment)
    with av.open(str(video.absolute())) as container:
        for number, frame in enumerate(container.decode(video=0)):
            with (folder / f"{number:06d}.png").open("wb") as file:
                frame.to_image().save(file, "PNG", pnginfo=about)
                file.flush()
                os.fsync(file.fileno())


def write_gif(video: Path, target: Path, end_s: Fraction, comment: str | None = None) -> None:
    """The frames of a video that ends at `end_s` seconds as a GIF that repeats. `comment`: ASCII text for a comment
    extension, which FFmpeg does not write."""
    kept = list(_kept_times(video))
    end = max(round(end_s / _CENTISECOND), kept[-1][1] + _SHORTEST)
    options = {"final_delay": str(end - kept[-1][1])}
    with av.open(str(target.absolute()), "w", format="gif", options=options) as out:
        stream: Any = out.add_stream("gif", rate=100)
        stream.width, stream.height, stream.pix_fmt = (*_size(video), "pal8")
        stream.codec_context.time_base = stream.time_base = _CENTISECOND
        for picture in _paletted(video, dict(kept)):
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
    if comment is not None:
        _insert_comment(target, comment.encode("ascii"))
    with target.open("rb+") as file:
        os.fsync(file.fileno())


def _decoded(video: Path) -> Iterator[tuple[int, Any]]:
    """Numbered frames."""
    with av.open(str(video.absolute())) as container:
        yield from enumerate(container.decode(video=0))


def _size(video: Path) -> tuple[int, int]:
    with av.open(str(video.absolute())) as container:
        stream = container.streams.video[0]
        return stream.width, stream.height


def _kept_times(video: Path) -> Iterator[tuple[int, int]]:
    """(number of a frame, its time in hundredths of a second), without frames that no player shows in time."""
    before, number, left_out = -_SHORTEST, -1, 0
    with av.open(str(video.absolute())) as container:
        times = sorted(p.pts * p.time_base for p in container.demux(video=0) if p.pts is not None)
    for number, seconds in enumerate(times):
        time = round(seconds / _CENTISECOND)
        if time - before < _SHORTEST:
            left_out += 1
            continue
        before = time
        yield number, time
    if left_out:
        warn(
            f"GIF players show at most 50 frames per second. Frames left out: {left_out} of {number + 1}. Use .webm to "
            "keep them."
        )


def _paletted(video: Path, times: dict[int, int]) -> Iterator[Any]:
    """The frames at these times (number → hundredths of a second), in the colours of one palette."""
    size: dict[str, Any] = {**dict(zip(("width", "height"), _size(video), strict=True)), "time_base": _CENTISECOND}
    graph: Any = Graph()
    frames, generate, sink = graph.add_buffer(format="rgb24", **size), graph.add("palettegen"), graph.add("buffersink")
    frames.link_to(generate)
    generate.link_to(sink)
    graph.configure()
    for number, frame in _decoded(video):
        frames.push(_at(frame, number))
    frames.push(None)
    palette = _at(sink.pull(), 0)

    graph = Graph()
    frames, use, sink = graph.add_buffer(format="rgb24", **size), graph.add("paletteuse"), graph.add("buffersink")
    colours = graph.add_buffer(
        width=palette.width, height=palette.height, format=palette.format.name, time_base=_CENTISECOND
    )
    frames.link_to(use, 0, 0)
    colours.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    colours.push(palette)
    colours.push(None)
    for number, frame in _decoded(video):
        if number in times:
            frames.push(_at(frame, times[number]))
            yield from _pulled(sink)
    frames.push(None)
    yield from _pulled(sink)


def _pulled(sink: Any) -> Iterator[Any]:
    while True:
        try:
            yield sink.pull()
        except (av.BlockingIOError, av.EOFError):
            return


def _at(frame: Any, time: int) -> Any:
    """The frame at this time, in hundredths of a second; a video frame in RGB."""
    if frame.format.name == "gbrp":
        frame = frame.reformat(format="rgb24")
    frame.pts, frame.time_base = time, _CENTISECOND
    return frame


def _insert_comment(gif: Path, comment: bytes) -> None:
    """Puts a comment extension (GIF89a §24) behind the global colour table, where readers look for it."""
    data = gif.read_bytes()
    start = 13 + (3 << ((data[10] & 7) + 1) if data[10] & 0x80 else 0)
    blocks = [comment[i : i + 255] for i in range(0, len(comment), 255)]
    extension = b"\x21\xfe" + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"
    gif.write_bytes(data[:start] + extension + data[start:])


def is_frame_folder(path: Path) -> bool:
    """Whether a folder holds numbered PNG files and nothing else, or nothing."""
    return path.is_dir() and all(
        file.suffix == ".png" and file.stem.isdecimal() and file.is_file() for file in path.iterdir()
    )


def replace_output(temporary: Path, output: Path) -> None:
    """Moves a complete file or folder into its place. A folder that is there is moved aside first, since a file system
    replaces only files in one step, and is moved back if that fails."""
    old = output.with_name(f".{output.name}.old")
    aside = temporary.is_dir() and (output.is_dir() or output.is_symlink())
    if aside:
        remove(old)
        os.replace(output, old)
    try:
        os.replace(temporary, output)
    except OSError:
        if aside:
            os.replace(old, output)
        raise
    if output.is_dir():
        remove(old)  # also what a run that was killed here has left


def remove(path: Path) -> None:
    """A file, a folder with its files, or nothing that is there; of a link, the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
