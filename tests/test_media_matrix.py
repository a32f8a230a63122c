"""Videos, sound and pictures as people have them, through the installed command.

Every row of `ROWS` is a case folder. One `generate --batch` for each output size makes all their videos (tiny engines,
one step), and each row is then held against its own: frames, rate and times, warnings, tracks, durations and when the
clicks are heard. The generated pixels are noise, so colours and orientation are looked at where the model reads them,
in the driving clips that `read_clips` gives for the same folder. `BAD` are the inputs that must be refused in one line.
What single functions do with such files is tested in `test_media.py` and `test_video_writer.py`.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from scail2_rt.runtime.case import read_case
from scail2_rt.runtime.demo import write_video
from scail2_rt.runtime.driving import read_clips
from scail2_rt.runtime.media import load_image, probe_video
from scail2_rt.runtime.request import Request, check_request
from tests.clips import (
    SCENE,
    clicks_s,
    cut_in_packet,
    number_of,
    overwrite,
    packet_at,
    scene,
    set_avi_frames,
    set_display_matrix,
    write_clip,
)
from tests.command import Run, error_of, one_json

pytest_plugins = ["tests.runtime_fixtures"]

FILM, NTSC = Fraction(24000, 1001), Fraction(30000, 1001)
RATE = Fraction(25, 2)  # 13 frames, one segment, last a second
QUICK = ("--steps", "1", "--segment-length", "13", "--guidance", "1")
BLACK = (0, 0, 0)
LOSSLESS = {"codec": "ffv1", "options": {}}
INDEX_IN_FRONT = {"movflags": "faststart"}
NO_B_FRAMES = {"crf": "10", "bf": "0"}
B_FRAMES = {"crf": "10", "bf": "3", "b-adapt": "0", "g": "30"}
Make = Callable[[Path], object]


@dataclass(frozen=True, slots=True)
class Row:
    """A driving video in a case folder and what must come of it.

    make      writes the driving video (and may change the folder)
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
    """Writes `scene` as the folder's driving video."""
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


def transparent(folder: Path) -> None:
    """A colour hides under the transparent quarter."""
    frames = np.concatenate([scene(9), np.full((9, 64, 96, 1), 255, np.uint8)], axis=-1)
    frames[:, 32:, :48, 3] = 0
    write_clip(folder / "driving.mov", frames, RATE, codec="png", pixel_format="rgba", options={})


def animated_webp(folder: Path) -> None:
    images = [Image.fromarray(frame) for frame in scene(9)]
    images[0].save(folder / "driving.webp", save_all=True, append_images=images[1:], duration=80, lossless=True)


def raw_stream(folder: Path) -> None:
    write_clip(folder / "a.h264", scene(9), 25).rename(folder / "driving.mp4")


def joined(*tracks: tuple[str, int, str]) -> Make:
    """Transport streams end to end, one for each track: times start anew in each."""

    def make(folder: Path) -> None:
        parts = [write_clip(folder / f"{i}.ts", scene(13), RATE, audio=[track]) for i, track in enumerate(tracks)]
        (folder / "driving.ts").write_bytes(b"".join(part.read_bytes() for part in parts))

    return make


def forget_codec(path: Path) -> None:
    """Gives the PCM track of a mov a codec that nobody knows."""
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
    """A driving video with a mask video of its own, which is written last."""

    def both(folder: Path) -> None:
        make(folder)
        mask(folder)

    return both


def reference(save: Callable[[Image.Image, Path], object]) -> Make:
    """Another reference image, saved by `save`; the driving video is an ordinary one."""

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
    Row("alpha", transparent, shown={**SCENE, "bottom left": BLACK}, within=1),
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
    Row("header with more", then(clip("avi"), lambda path: set_avi_frames(path, 12)), warns=("12 frames but 9",)),
    Row("header with fewer", then(clip("avi"), lambda path: set_avi_frames(path, 5)), warns=("5 frames but has 9",)),
    Row(
        "mp4 cut short",
        then(
            clip("mp4", 20, container_options=INDEX_IN_FRONT, options=NO_B_FRAMES), lambda path: cut_in_packet(path, 9)
        ),
        numbers=range(9),
        warns=("20 frames but 9 can be decoded",),
    ),
    Row(
        "mkv cut short",
        then(clip("mkv", 20, **LOSSLESS), lambda path: cut_in_packet(path, 9)),
        warns=("it lasts 1.60 s",),
    ),
    Row(
        "a damaged frame",
        then(clip("mp4", options=NO_B_FRAMES), lambda path: overwrite(path, packet_at(path, 5)[-8:])),
        warns=("1 of its frames are patched up by the decoder (the first is frame 5)",),
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
        "damaged sound",
        then(
            sound("mov", ("mp2", 44100, "mono")),
            lambda path: [overwrite(path, packet_at(path, i, "audio")) for i in (14, 15, 16)],
        ),
        ("aac", 44100, 1),
        warns=("3 damaged audio packets",),
    ),
]


@pytest.fixture(scope="module")
def folders(case: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A case folder for each row."""
    root = tmp_path_factory.mktemp("rows")
    for row in ROWS:
        write_case(case, root / row.name, row.make, mask_of(len(row.numbers), row.shape, row.rate or RATE))
    return root


def write_case(case: Path, folder: Path, make: Make, mask: Make) -> Path:
    """References of `case`, a mask video, and what `make` writes (a mask video of its own as well)."""
    folder.mkdir()
    for name in ("ref.png", "ref_mask.png"):
        shutil.copy(case / name, folder)
    mask(folder)
    make(folder)
    return folder


@pytest.fixture(scope="module")
def results(
    scail2: Run, engines: Path, folders: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Name of a row → the report of its run. One command for each size."""
    reports = {}
    for size in sorted({row.size for row in ROWS}):
        names = [row.name for row in ROWS if row.size == size]
        (folders / "batch.txt").write_text("".join(f"None@@{name}\n" for name in names))
        output = tmp_path_factory.mktemp(size)
        result = scail2(
            "generate", engines, "--batch", folders / "batch.txt", "-o", output, "--size", size, *QUICK, "--json"
        )
        reports |= dict(zip(names, one_json(result)["cases"], strict=True))
        assert (result.returncode == 0) == all(reports[name]["status"] == "complete" for name in names)
    return reports


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_video(row: Row, results: dict[str, dict[str, Any]]) -> None:
    report = results[row.name]
    assert report["status"] == "complete", report
    output = probe_video(Path(report["output"]))
    assert output.frames == report["frames"] == len(row.numbers)
    assert f"{output.height}x{output.width}" == row.size
    assert output.warnings == ()
    if row.rate is None:
        assert output.timestamps == tuple(Fraction(ms, 1000) for ms in VARIABLE_MS)
    else:
        assert (output.frame_rate, output.timestamps) == (row.rate, None)
    missing = [part for part in row.warns if not any(part in warning for warning in report["warnings"])]
    assert not missing, report["warnings"]
    assert len(report["warnings"]) == len(row.warns), report["warnings"]


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_pixels_that_the_model_reads(row: Row, folders: Path, tmp_path: Path) -> None:
    height, width = (int(side) for side in row.size.split("x"))
    files = read_case(folders / row.name)
    plan = check_request(
        Request(
            files.image,
            files.mask_image,
            files.driving,
            files.mask_video,
            tmp_path / "a.mp4",
            size=(height, width),
            segment_length=13,
        )
    )
    clips = list(read_clips(plan))
    frames = np.concatenate([clip.frames[clip.segment.overlap : clip.segment.valid_frames].numpy() for clip in clips])
    ys, xs = {"top": height // 4, "bottom": height * 3 // 4}, {"left": width // 4, "right": width * 3 // 4}
    quarters = {  # [T, 3]: means of patches, as a gif is dithered
        f"{v} {h}": frames[:, :, y - 4 : y + 4, x - 4 : x + 4].mean((2, 3))
        for v, y in ys.items()
        for h, x in xs.items()
    }
    shown = row.shown or SCENE
    for where, colour in shown.items():
        assert np.abs(quarters[where] - colour).max() <= row.within, where
    (number_at,) = set(quarters) - set(shown)
    assert [number_of(patch) for patch in quarters[number_at]] == list(row.numbers)


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_sound(row: Row, results: dict[str, dict[str, Any]]) -> None:
    output = Path(results[row.name]["output"])
    with av.open(str(output)) as container:
        video, tracks = container.streams.video[0], container.streams.audio
        assert tuple((t.codec_context.codec.canonical_name, t.rate, t.channels) for t in tracks) == row.tracks
        length_s = video.duration * video.time_base
        for track in tracks:
            expected = row.sound_s or length_s
            assert float(track.duration * track.time_base) == pytest.approx(float(expected), abs=0.03)
    for number in range(len(row.tracks)):
        clicks = [second for second in clicks_s(output, number) if second < length_s - Fraction(1, 1000)]
        assert clicks == pytest.approx(row.heard, abs=row.sync_s)


@pytest.mark.parametrize("row", [row for row in ROWS if row.name.startswith("reference")], ids=lambda row: row.name)
def test_reference(row: Row, folders: Path) -> None:
    image = load_image(read_case(folders / row.name).image)
    assert image.shape == (64, 96, 3)
    grey = row.name.endswith("16 bits")
    for (y, x), colour in zip(((16, 24), (16, 72), (48, 24)), (GREY_SCENE if grey else SCENE).values(), strict=True):
        assert np.abs(image[y, x].astype(int) - colour).max() < 12


def test_names_and_mov(scail2: Run, engines: Path, case: Path, tmp_path: Path) -> None:
    """Names with spaces, colons, percent signs and letters of other alphabets, relative to the working folder; sound
    that a .mov cannot hold as it is."""
    sound("webm", ("libopus", 48000, "mono"), codec="libvpx", options={"b": "1000000"})(tmp_path)
    names = {"--driving": "12:30 Tänzer %03d.webm", "--mask-video": "маска 面具.mp4", "--image": "re: f.png"}
    (tmp_path / "driving.webm").rename(tmp_path / names["--driving"])
    mask_of(13, (64, 96))(tmp_path)
    (tmp_path / "rendered_mask_v2.mp4").rename(tmp_path / names["--mask-video"])
    shutil.copy(case / "ref.png", tmp_path / names["--image"])
    files = [word for pair in names.items() for word in pair]
    words = (*files, "--mask-image", case / "ref_mask.png", "-o", "out: ü/a: b.mov", "--size", "64x96", *QUICK)
    result = scail2("generate", engines, *words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    output = tmp_path / "out: ü" / "a: b.mov"
    assert sorted(path.name for path in output.parent.iterdir()) == ["a: b.json", "a: b.mov"]
    assert probe_video(output).frames == 13
    assert clicks_s(output) == pytest.approx((0, 0.25, 0.5, 0.75, 1), abs=0.002)
    with av.open(str(output)) as container:
        assert container.streams.audio[0].codec_context.codec.canonical_name == "aac"


@dataclass(frozen=True, slots=True)
class Bad:
    """An input that cannot be used, and what the one line must say."""

    name: str
    make: Make
    says: tuple[str, ...]
    frames: int = 9  # of the mask
    arguments: tuple[str, ...] = ()


def grows(folder: Path) -> None:
    """Two raw streams behind one another: the size changes at frame 4."""
    parts = [write_clip(folder / f"{height}.h264", scene(4, height), 25) for height in (64, 96)]
    (folder / "driving.mp4").write_bytes(b"".join(part.read_bytes() for part in parts))


BAD = [
    Bad("fewer masks", clip("mp4"), ("driving.mp4 has 9 frames but", "has 8", "one mask a frame"), frames=8),
    Bad(
        "masks of another rate",
        with_mask(clip("mp4"), mask_of(22, (64, 96), Fraction(30))),
        ("driving.mp4 has 9 frames at 12.5 fps", "has 22 at 30 fps", "from this very clip"),
    ),
    Bad(
        "cut short",
        then(
            clip("mp4", 20, container_options=INDEX_IN_FRONT, options=NO_B_FRAMES), lambda path: cut_in_packet(path, 9)
        ),
        ("driving.mp4 has 9 frames", "has 20", "driving.mp4 says it holds 20 frames", "cut short"),
        frames=20,
    ),
    Bad(
        "damaged in the middle",
        then(clip("mp4", options=NO_B_FRAMES), lambda path: overwrite(path, packet_at(path, 5))),
        ("driving.mp4 cannot be decoded at frame 5", "re-encode it to H.264"),
    ),
    Bad("size changes", grows, ("driving.mp4 changes its size at frame 4", "re-encode it to H.264"), frames=8),
    Bad(
        "damaged animated webp",
        then(animated_webp, lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])),
        ("driving.webp is a damaged animation", "export it again as mp4"),
    ),
    Bad("vp9 in mov", clip("mp4"), (".mov file cannot hold vp9", "--codec hevc"), arguments=("--codec", "vp9")),
]


@pytest.mark.parametrize("bad", BAD, ids=[bad.name for bad in BAD])
def test_refused_in_one_line(scail2: Run, engines: Path, case: Path, tmp_path: Path, bad: Bad) -> None:
    folder = write_case(case, tmp_path / "case", bad.make, mask_of(bad.frames, (64, 96)))
    result = scail2("generate", engines, "--case", folder, "-o", tmp_path / "a.mov", "--size", "64x96", *bad.arguments)
    message = error_of(result)
    assert [part for part in bad.says if part not in message] == [], message
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["case"]
