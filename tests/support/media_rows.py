"""The table of `test_media_matrix.py`: driving clips, audio and reference images in many formats, and the expected
results. A row's `make` writes into a case folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scail2_rt.runtime.media.lossless import write_video
from tests.support.clips import (
    SCENE,
    cut_in_packet,
    overwrite,
    packet_at,
    scene,
    set_avi_frames,
    set_display_matrix,
    write_clip,
)

FILM, NTSC = Fraction(24000, 1001), Fraction(30000, 1001)
RATE = Fraction(25, 2)  # 13 frames, one segment, last one second
BLACK = (0, 0, 0)
LOSSLESS = {"codec": "ffv1", "options": {}}
INDEX_IN_FRONT = {"movflags": "faststart"}
NO_B_FRAMES = {"crf": "10", "bf": "0"}
B_FRAMES = {"crf": "10", "bf": "3", "b-adapt": "0", "g": "30"}
WEB_ALPHA = {"auto-alt-ref": "0"}  # FFmpeg's encoders take transparency in this way alone
Make = Callable[[Path], object]


@dataclass(frozen=True, slots=True)
class Row:
    """A driving clip in a case folder, and the expected result.

    make      writes the driving clip (and may change the folder)
    shape     height and width of its upright frames; the mask has them too
    size      --size; rate None: the times of its frames are kept
    numbers   the frames' numbers in `scene`
    shown     colours of the quarters where they differ from `SCENE`; within: their tolerance in 8-bit levels
    warns     parts of the warnings, one each, and no others
    tracks    (codec, sample rate, channels) of the result; sound_s its length where it is not the video's
    heard     seconds at which clicks are heard; sync_s their tolerance"""

    name: str
    make: Make
    numbers: Sequence[int] = range(9)
    rate: Fraction | None = RATE
    shape: tuple[int, int] = (64, 96)
    size: str = "64x96"
    shown: dict[str, tuple[int, int, int]] | None = None
    within: int = 12
    warns: tuple[str, ...] = ()
    tracks: tuple[tuple[str, int, int], ...] = ()
    sound_s: float | None = None
    heard: tuple[float, ...] = (0, 0.25, 0.5, 0.75, 1)
    sync_s: float = 0.002


def clip(ending: str, frames: int = 9, rate: Fraction = RATE, shape: tuple[int, int] = (64, 96), **more: Any) -> Make:
    """Writes `scene` as the folder's driving clip."""
    return lambda folder: write_clip(folder / f"driving.{ending}", scene(frames, *shape), rate, **more)


def then(make: Make, change: Callable[[Path], object]) -> Make:
    """`make`, then `change` the video it wrote."""

    def both(folder: Path) -> None:
        make(folder)
        (path,) = folder.glob("driving.*")
        change(path)

    return both


def sound(ending: str, *tracks: tuple[str, int, str], **more: Any) -> Make:
    return clip(ending, 13, audio=tracks, **more)


def heard(name: str, make: Make, *tracks: tuple[str, int, int], **more: Any) -> Row:
    return Row(name, make, numbers=range(13), tracks=tracks, **more)


def transparent(ending: str = "mov", **coding: Any) -> Make:
    """A colour hides under the transparent quarter."""
    frames = np.concatenate([scene(9), np.full((9, 64, 96, 1), 255, np.uint8)], axis=-1)
    frames[:, 32:, :48, 3] = 0
    coding = coding or {"codec": "png", "pixel_format": "rgba", "options": {}}
    return lambda folder: write_clip(folder / f"driving.{ending}", frames, RATE, **coding)


def animated_webp(folder: Path) -> None:
    images = [Image.fromarray(frame) for frame in scene(9)]
    images[0].save(folder / "driving.webp", save_all=True, append_images=images[1:], duration=80, lossless=True)


def raw_stream(folder: Path) -> None:
    write_clip(folder / "a.h264", scene(9), 25).rename(folder / "driving.mp4")


def joined(*tracks: tuple[str, int, str]) -> Make:
    """Concatenated transport streams, one per track: times restart in each."""

    def make(folder: Path) -> None:
        parts = [write_clip(folder / f"{i}.ts", scene(13), RATE, audio=[track]) for i, track in enumerate(tracks)]
        (folder / "driving.ts").write_bytes(b"".join(part.read_bytes() for part in parts))

    return make


def forget_codec(path: Path) -> None:
    """Gives the PCM track of a mov an unknown codec."""
    data = path.read_bytes()
    assert data.count(b"sowt") == 1
    path.write_bytes(data.replace(b"sowt", b"zzzz"))


def mask_of(frames: int, shape: tuple[int, int], rate: Fraction = RATE) -> Make:
    """The driving mask: a red figure in the middle of black."""
    mask = np.zeros((*shape, 3), np.uint8)
    height, width = shape
    mask[height // 4 : height * 3 // 4, width // 3 : width * 2 // 3] = (255, 0, 0)
    return lambda folder: write_video(folder / "rendered_mask_v2.mp4", iter([mask] * frames), rate)


def with_mask(make: Make, mask: Make) -> Make:
    """A driving clip with its own mask video, which is written last."""

    def both(folder: Path) -> None:
        make(folder)
        mask(folder)

    return both


def reference(save: Callable[[Image.Image, Path], object]) -> Make:
    """Another reference image, saved by `save`; the driving clip is an ordinary one."""

    def make(folder: Path) -> None:
        clip("mp4", 5)(folder)
        (folder / "ref.png").unlink()
        save(Image.fromarray(scene(1)[0]), folder)

    return make


def turned_photo(picture: Image.Image, folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, shown turned a quarter clockwise
    picture.rotate(90, expand=True).save(folder / "ref.jpg", exif=exif, quality=95, subsampling=0)


def deep_grey(picture: Image.Image, folder: Path) -> None:
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(folder / "ref.png")


GREY_SCENE = {where: (round(0.299 * r + 0.587 * g + 0.114 * b),) * 3 for where, (r, g, b) in SCENE.items()}
CLOCKWISE = dict(zip(("top right", "bottom right", "top left"), SCENE.values(), strict=True))
VARIABLE_MS = (0, 40, 80, 200, 240, 400, 440, 441, 900)

ROWS = [
    # containers, rates and times
    Row("23.976 in mkv", clip("mkv", rate=FILM), rate=FILM),
    Row("29.97 in mov", clip("mov", rate=NTSC), rate=NTSC),
    Row("variable rate", clip("mkv", pts=VARIABLE_MS, time_base=Fraction(1, 1000), options=NO_B_FRAMES), rate=None),
    Row("gif", clip("gif", codec="gif", pixel_format="rgb8", options={}), within=45),
    Row("animated webp", animated_webp, within=1),
    Row("raw stream without times", raw_stream, rate=Fraction(25)),
    Row("first frame at 4 s", clip("mkv", pts=range(50, 59))),
    Row("times below zero", clip("mkv", pts=range(-20, -11))),
    Row("trimmed by an edit list", clip("mp4", pts=range(-3, 6), options=NO_B_FRAMES), numbers=range(3, 9)),
    # lengths: segments of 4n+1 frames
    Row("one frame", clip("mp4", 1), numbers=range(1)),
    Row("12 frames", clip("mp4", 12), numbers=range(12)),
    Row("13 frames", clip("mp4", 13), numbers=range(13)),
    Row("14 frames", clip("mp4", 14), numbers=range(14)),
    # shapes
    Row("portrait", clip("mp4", shape=(96, 64)), shape=(96, 64), size="96x64"),
    Row("square", clip("mp4", shape=(80, 80)), shape=(80, 80), size="64x64"),
    Row("portrait into landscape", clip("mp4", shape=(120, 66)), shape=(120, 66)),
    Row("wide into square", clip("mp4", shape=(48, 130)), shape=(48, 130), size="64x64"),
    Row(
        "odd size", clip("webm", shape=(75, 101), codec="libvpx-vp9", options={"crf": "10", "b": "0"}), shape=(75, 101)
    ),
    Row(
        "filmed upright",
        then(clip("mp4"), lambda path: set_display_matrix(path, 0, 1, -1, 0)),
        shape=(96, 64),
        size="96x64",
        shown=CLOCKWISE,
    ),
    # pixels
    Row("grey", clip("mkv", pixel_format="gray", **LOSSLESS), shown=GREY_SCENE),
    *(
        Row(
            f"alpha of {codec}",
            transparent("webm", codec=codec, pixel_format="yuva420p", options={**WEB_ALPHA, "crf": "4", "b": "2M"}),
            shown={**SCENE, "bottom left": BLACK},
        )
        for codec in ("libvpx", "libvpx-vp9")
    ),
    Row("alpha", transparent(), shown={**SCENE, "bottom left": BLACK}, within=1),
    Row("10 bits", clip("mp4", pixel_format="yuv420p10le")),
    Row(
        "HLG",
        clip(
            "mkv", 5, codec="libx265", pixel_format="yuv420p10le", transfer=18, options={"x265-params": "log-level=0"}
        ),
        numbers=range(5),
        warns=("is HDR",),
        within=40,
    ),
    Row("interlaced", clip("ts", options={**NO_B_FRAMES, "x264-params": "interlaced=1"}), warns=("is interlaced",)),
    # headers that lie, damage
    Row("header with more", then(clip("avi"), lambda path: set_avi_frames(path, 12)), warns=("12 frames, but 9",)),
    Row(
        "header with fewer", then(clip("avi"), lambda path: set_avi_frames(path, 5)), warns=("5 frames, but it has 9",)
    ),
    Row(
        "mp4 cut short",
        then(
            clip("mp4", 20, container_options=INDEX_IN_FRONT, options=NO_B_FRAMES), lambda path: cut_in_packet(path, 9)
        ),
        numbers=range(9),
        warns=("20 frames, but 9 can be decoded",),
    ),
    Row(
        "mkv cut short",
        then(clip("mkv", 20, **LOSSLESS), lambda path: cut_in_packet(path, 9)),
        warns=("states 1.60 s",),
    ),
    Row(
        "a damaged frame",
        then(clip("mp4", options=NO_B_FRAMES), lambda path: overwrite(path, packet_at(path, 5)[-8:])),
        warns=("the decoder repairs 1 frame, the first of which is frame 5",),
    ),
    # masks
    Row(
        "mask of another rate",
        with_mask(clip("mp4"), mask_of(9, (64, 96), Fraction(30))),
        warns=("12.5 fps but its mask at 30 fps",),
    ),
    Row("mask of another shape", with_mask(clip("mp4"), mask_of(9, (64, 64))), warns=("64x96 but its mask is 64x64",)),
    # references
    Row("reference turned by EXIF", reference(turned_photo), range(5)),
    Row("reference in CMYK", reference(lambda p, d: p.convert("CMYK").save(d / "ref.jpg", quality=95)), range(5)),
    Row("reference with a palette", reference(lambda p, d: p.quantize(16).save(d / "ref.png")), range(5)),
    Row("reference of 16 bits", reference(deep_grey), range(5)),
    # sound
    heard("aac with B frames", sound("mp4", ("aac", 44100, "stereo"), options=B_FRAMES), ("aac", 44100, 2)),
    heard("pcm 11025", sound("mov", ("pcm_s16le", 11025, "mono")), ("aac", 11025, 1)),
    heard("mp3 22050", sound("mkv", ("libmp3lame", 22050, "mono")), ("mp3", 22050, 1)),
    heard(
        "mp3 in avi",
        sound("avi", ("libmp3lame", 44100, "stereo"), options=NO_B_FRAMES),
        ("mp3", 44100, 2),
        heard=tuple(0.0251 + 0.25 * i for i in range(5)),  # the encoder's delay, which avi cannot store
    ),
    heard("aac in a transport stream", sound("ts", ("aac", 48000, "mono")), ("aac", 48000, 1)),
    heard(
        "opus",
        sound("webm", ("libopus", 48000, "stereo"), codec="libvpx", options={"b": "1000000"}),
        ("opus", 48000, 2),
    ),
    heard("5.1", sound("mkv", ("ac3", 48000, "5.1")), ("ac3", 48000, 6)),
    heard(
        "three tracks",
        sound("mov", ("aac", 48000, "stereo"), ("pcm_s16le", 22050, "mono"), ("pcm_s16le", 48000, "5.1")),
        ("aac", 48000, 2),
        ("aac", 22050, 1),
        ("aac", 48000, 6),
    ),
    heard(
        "a track of an unknown codec",
        then(sound("mov", ("aac", 48000, "stereo"), ("pcm_s16le", 22050, "mono")), forget_codec),
        ("aac", 48000, 2),
        warns=("Audio track 2 of",),
    ),
    heard("8 s of sound", sound("mp4", ("aac", 11025, "mono"), audio_s=8), ("aac", 11025, 1)),
    Row(
        "8 s of sound for one frame",
        clip("mov", 1, audio=[("pcm_s16le", 48000, "stereo")], audio_s=8),
        numbers=range(1),
        tracks=(("aac", 48000, 2),),
        heard=(0,),
    ),
    heard(
        "short sound",
        sound("mov", ("pcm_s16le", 44100, "mono"), audio_s=0.6),
        ("aac", 44100, 1),
        sound_s=0.6,
        heard=(0, 0.25, 0.5),
    ),
    heard(
        "late sound",
        sound("mov", ("pcm_s16le", 44100, "mono"), audio_s=0.7, audio_from_s=0.3),
        ("aac", 44100, 1),
        sound_s=0.7,
        heard=(0.3, 0.55, 0.8),
    ),
    heard(
        "late picture",
        sound("mkv", ("aac", 44100, "mono"), pts=range(5, 18), audio_s=2),
        ("aac", 44100, 1),
        heard=(0.1, 0.35, 0.6, 0.85),
    ),
    Row(
        "joined streams, sound copied",
        joined(("aac", 44100, "stereo"), ("aac", 44100, "stereo")),
        numbers=(*range(13), *range(13)),
        tracks=(("aac", 44100, 2),),
        heard=(0, 0.25, 0.5, 0.75, 1, 1.29, 1.54, 1.79, 2.04),
        sync_s=0.03,
    ),
    Row(
        "joined streams, sound of two kinds",
        joined(("mp2", 44100, "stereo"), ("mp2", 44100, "mono")),
        numbers=(*range(13), *range(13)),
        tracks=(("aac", 44100, 1),),
        heard=(0, 0.25, 0.5, 0.75, 1, 1.29, 1.54, 1.79, 2.04),
        sync_s=0.03,
    ),
    heard(
        "sound of a file cut short",
        then(
            clip("mp4", 20, audio=[("aac", 44100, "mono")], container_options=INDEX_IN_FRONT, options=NO_B_FRAMES),
            lambda path: cut_in_packet(path, 13),
        ),
        ("aac", 44100, 1),
        warns=("20 frames, but 13 can be decoded",),
    ),
    heard(
        "damaged sound",
        then(
            sound("mov", ("mp2", 44100, "mono")),
            lambda path: [overwrite(path, packet_at(path, i, "audio")) for i in (14, 15, 16)],
        ),
        ("aac", 44100, 1),
        warns=("3 damaged audio packets",),
    ),
]
