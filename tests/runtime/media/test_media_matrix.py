"""Videos, audio and images in many formats, through the installed command.

Every row of `ROWS` (in `media_rows.py`) is a case folder. One `generate --batch` per output size makes all videos (tiny
engines, one step). Each is compared with its row: frames, rate and times, warnings, tracks, durations and the times of
the clicks. The generated pixels are noise, so colours and orientation are checked in the driving clips that
`read_clips` reads from the same folder. `BAD` lists inputs that must be refused with a one-line error. Single functions
are tested in `test_video_reader.py` and `test_video_writer.py`.
"""

import shutil
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from scail2_rt.runtime.core.case_folder import read_case
from scail2_rt.runtime.core.request import Request
from scail2_rt.runtime.media.images import load_image
from scail2_rt.runtime.media.video_reader import probe_video
from scail2_rt.runtime.pipeline.driving import read_clips
from scail2_rt.runtime.session.check import check_request
from tests.support.clips import SCENE, clicks_s, cut_in_packet, number_of, overwrite, packet_at, scene, write_clip
from tests.support.command import Run, error_of, one_json
from tests.support.media_rows import (
    GREY_SCENE,
    INDEX_IN_FRONT,
    NO_B_FRAMES,
    RATE,
    ROWS,
    VARIABLE_MS,
    Make,
    Row,
    animated_webp,
    clip,
    mask_of,
    sound,
    then,
    with_mask,
)

pytest_plugins = ["tests.support.runtime_fixtures"]

QUICK = ("--steps", "1", "--segment-length", "13", "--guidance", "1")


@pytest.fixture(scope="module")
def folders(case: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One case folder per row."""
    root = tmp_path_factory.mktemp("rows")
    for row in ROWS:
        write_case(case, root / row.name, row.make, mask_of(len(row.numbers), row.shape, row.rate or RATE))
    return root


def write_case(case: Path, folder: Path, make: Make, mask: Make) -> Path:
    """Reference image and mask of `case`, a mask video, and the files that `make` writes (possibly another mask
    video)."""
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
    """Row name → run report. One command per output size."""
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
def test_pixels_that_the_model_reads(row: Row, folders: Path) -> None:
    height, width = (int(side) for side in row.size.split("x"))
    files = read_case(folders / row.name)
    plan = check_request(
        Request(
            files.image,
            files.mask_image,
            files.driving,
            files.mask_video,
            size=(height, width),
            fit="official",  # keeps the quarters in place; other windows depend on the masks
            segment_length=13,
        )
    )
    clips = list(read_clips(plan))
    frames = np.concatenate([clip.frames[clip.segment.overlap : clip.segment.valid_frames].numpy() for clip in clips])
    ys, xs = {"top": height // 4, "bottom": height * 3 // 4}, {"left": width // 4, "right": width * 3 // 4}
    quarters = {  # [T, 3]: means of patches, because a GIF is dithered
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
    """Names with spaces, colons, percent signs and letters of other alphabets, relative to the working folder; audio
    that must be converted for a .mov."""
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
    """An unusable input, and the expected error text."""

    name: str
    make: Make
    says: tuple[str, ...]
    frames: int = 9  # of the mask video
    arguments: tuple[str, ...] = ()


def grows(folder: Path) -> None:
    """Two concatenated raw streams: the size changes at frame 4."""
    parts = [write_clip(folder / f"{height}.h264", scene(4, height), 25) for height in (64, 96)]
    (folder / "driving.mp4").write_bytes(b"".join(part.read_bytes() for part in parts))


BAD = [
    Bad("fewer masks", clip("mp4"), ("driving.mp4 has 9 frames but", "has 8", "one mask per frame"), frames=8),
    Bad(
        "masks of another rate",
        with_mask(clip("mp4"), mask_of(22, (64, 96), Fraction(30))),
        ("driving.mp4 has 9 frames at 12.5 fps", "has 22 at 30 fps", "from this clip"),
    ),
    Bad(
        "cut short",
        then(
            clip("mp4", 20, container_options=INDEX_IN_FRONT, options=NO_B_FRAMES), lambda path: cut_in_packet(path, 9)
        ),
        ("driving.mp4 has 9 frames", "has 20", "driving.mp4 states 20 frames", "cut short"),
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
    Bad("vp9 in mov", clip("mp4"), (".mov file cannot hold vp9", "--codec h264 or hevc"), arguments=("--codec", "vp9")),
]


@pytest.mark.parametrize("bad", BAD, ids=[bad.name for bad in BAD])
def test_refused_in_one_line(scail2: Run, engines: Path, case: Path, tmp_path: Path, bad: Bad) -> None:
    folder = write_case(case, tmp_path / "case", bad.make, mask_of(bad.frames, (64, 96)))
    result = scail2("generate", engines, "--case", folder, "-o", tmp_path / "a.mov", "--size", "64x96", *bad.arguments)
    message = error_of(result)
    assert [part for part in bad.says if part not in message] == [], message
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["case"]
