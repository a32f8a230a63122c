"""Characters that the frame would cut: check, dry run, run, report and preview, through the installed command.

The cases imitate reports from users. The files of the reports are also tested, if they are present."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scail2_rt.runtime.masks.palette import COLOURS, PALETTE
from scail2_rt.runtime.media.images import load_image
from scail2_rt.runtime.media.lossless import write_video
from tests.support.clips import write_clip
from tests.support.command import Run, error_of, one_json, read_video

pytest_plugins = ["tests.support.runtime_fixtures"]

QUICK = ("--steps", "1", "--segment-length", "13", "--guidance", "1")
FRAMES = 5
Box = tuple[float, float, float, float]
STANDING: Box = (0.08, 0.92, 0.35, 0.65)
LEFT: Box = (0.1, 0.95, 0.02, 0.2)
SHIRT, SKY = (40, 90, 200), (150, 200, 235)


def picture(size: tuple[int, int], box: Box, inside: tuple[int, int, int], around: tuple[int, int, int]) -> np.ndarray:
    """A block on a background; its top, bottom, left and right are shares of the sides."""
    frame = np.full((*size, 3), around, np.uint8)
    top, bottom, left, right = (
        round(share * side) for share, side in zip(box, (size[0],) * 2 + (size[1],) * 2, strict=True)
    )
    frame[top:bottom, left:right] = inside
    return frame


def write_case(
    folder: Path,
    mode: str,
    reference: tuple[tuple[int, int], Box],
    driving: tuple[tuple[int, int], Box],
    frames: int = FRAMES,
) -> Path:
    folder.mkdir()
    here, there = (PALETTE[name] for name in (("white", "black") if mode == "animate" else ("black", "white")))
    Image.fromarray(picture(*reference, SHIRT, SKY)).save(folder / "ref.png")
    Image.fromarray(picture(*reference, COLOURS["red"], here)).save(folder / "ref_mask.png")
    write_video(folder / "rendered_v2.mp4", iter([picture(*driving, SHIRT, SKY)] * frames), Fraction(16))
    name = "rendered_mask_v2.mp4" if mode == "animate" else "replace_mask.mp4"
    write_video(folder / name, iter([picture(*driving, COLOURS["red"], there)] * frames), Fraction(16))
    return folder


@pytest.fixture
def tall(tmp_path: Path) -> Path:
    """Animate mode: a phone clip of a standing character, and a landscape reference."""
    return write_case(tmp_path / "tall", "animate", ((64, 112), STANDING), ((224, 126), STANDING))


@pytest.fixture
def edge(tmp_path: Path) -> Path:
    """Replace mode: a landscape clip with its character at the left edge, and a portrait reference."""
    return write_case(tmp_path / "edge", "replace", ((112, 64), STANDING), ((126, 224), LEFT))


def test_a_phone_clip_with_a_landscape_reference(scail2: Run, engines: Path, tall: Path, tmp_path: Path) -> None:
    """Check, dry run, run and report give the same result."""
    case = ("--case", tall, "--size", "64x96")
    line = "framing (auto): driving clip: whole, with black margins left and right (the middle crop keeps 4"
    checked = scail2("masks", "check", *case)
    assert (checked.returncode, line in checked.stdout) == (0, True), checked.stdout
    words = ("generate", engines, *case, *QUICK, "-o", tmp_path / "a.mp4")
    assert line in scail2(*words, "--dry-run").stdout
    result = scail2(*words, "--json")
    assert line in result.stderr
    reply, report = one_json(result), json.loads((tmp_path / "a.json").read_text())
    assert reply["warnings"] == []
    assert reply["options"]["fit"] == "auto"
    driving, reference = report["framing"]["inputs"]
    assert report["framing"]["line"].startswith(line)
    assert (driving["name"], driving["way"], driving["kept"]) == ("driving clip", "pad", {"red": 1})
    assert driving["official_keeps"]["red"] == pytest.approx(0.45, abs=0.03)
    assert (reference["name"], reference["way"]) == ("reference", "official")
    assert driving["shown"] == [0, 224, 0, 126]
    top, left, height, width = driving["placed"]
    assert (top, height, width) == (0, 64, 36)
    assert left == 30


def test_official_is_refused_with_the_remedy(scail2: Run, engines: Path, tall: Path, tmp_path: Path) -> None:
    case = ("--case", tall, "--size", "64x96", "--fit", "official")
    checked = scail2("masks", "check", *case, "--json")
    assert checked.returncode == 2
    (found,) = [finding for finding in one_json(checked)["findings"] if finding["rule"] == "cropped"]
    assert (found["severity"], found["frames"]) == ("error", [[0, FRAMES - 1]])
    assert "--fit auto" in found["remedy"]
    words = ("generate", engines, *case, *QUICK, "-o", tmp_path / "a.mp4")
    for more in ((), ("--dry-run",)):
        message = error_of(scail2(*words, *more))
        assert found["says"] in message
        assert "--fit auto" in message
        assert "--allow-mask-problems" in message
    result = scail2(*words, "--allow-mask-problems", "--json")
    assert result.returncode == 0, result.stderr
    reply = one_json(result)
    assert any(found["says"] in warning for warning in reply["warnings"])
    assert f"warning: {found['says']}" in result.stderr
    assert reply["framing"]["inputs"][0]["kept"]["red"] == pytest.approx(0.45, abs=0.03)


def test_replacing_a_character_at_the_edge_keeps_the_scene(
    scail2: Run, engines: Path, edge: Path, tmp_path: Path
) -> None:
    """The default frame has the orientation of the clip. With the official rule it has that of the reference, and no
    character is visible."""
    checked = one_json(scail2("masks", "check", "--case", edge, "--json"))
    driving, reference = checked["framing"]["inputs"]
    assert driving["frame"] == reference["frame"] == [512, 896]
    assert (driving["way"], driving["kept"]["red"]) == ("official", pytest.approx(1, abs=0.001))
    assert (reference["way"], reference["kept"]["red"]) == ("pad", 1)
    dry = scail2("generate", engines, "--case", edge, "-o", tmp_path / "a.mp4", *QUICK, "--dry-run", "--json")
    reply = one_json(dry)
    assert (reply["height"], reply["width"]) == (512, 896)
    assert reply["framing"] == checked["framing"]
    words = ("--case", edge, "--fit", "official")
    message = error_of(scail2("generate", engines, *words, "-o", tmp_path / "a.mp4", *QUICK))
    assert "The 896x512 frame shows 0 % of the red character" in message
    assert "--fit crop" in message
    small = scail2("generate", engines, "--case", edge, "--size", "96x64", *QUICK, "-o", tmp_path / "b.mp4", "--json")
    assert "driving clip: cropped to columns 0 to 84 of 224 (the middle crop keeps 0 % of red)" in small.stderr
    assert one_json(small)["framing"]["inputs"][0]["kept"] == {"red": 1}


def test_a_scene_with_margins_is_reported(scail2: Run, edge: Path) -> None:
    text = scail2("masks", "check", "--case", edge, "--size", "64x64", "--fit", "pad").stdout
    assert "black margins above and below" in text
    assert "the video shows the scene with these margins" in text


def test_a_reference_in_the_left_third_at_a_square_size(scail2: Run, tmp_path: Path) -> None:
    case = write_case(tmp_path / "left", "animate", ((64, 192), (0.1, 0.9, 0.08, 0.25)), ((64, 64), STANDING))
    words = ("masks", "check", "--case", case, "--size", "64x64")
    assert "reference: cropped to columns 0 to 64 of 192 (the middle crop keeps 0 % of red)" in scail2(*words).stdout
    refused = scail2(*words, "--fit", "official")
    assert refused.returncode == 2
    assert "The 64x64 frame shows 0 % of the red character of" in refused.stdout


def test_some_frames_of_the_clip_warn(scail2: Run, engines: Path, tmp_path: Path) -> None:
    """A loss of a tenth to a half is a warning with frame numbers, which count from the first frame of the file."""
    case = write_case(tmp_path / "case", "animate", ((64, 64), STANDING), ((64, 128), STANDING), 9)
    masks = [picture((64, 128), (0.1, 0.9, 0.3, 0.6), COLOURS["red"], PALETTE["black"])] * 7
    masks += [picture((64, 128), (0.1, 0.9, 0.1, 0.4), COLOURS["red"], PALETTE["black"])] * 2
    write_video(case / "rendered_mask_v2.mp4", iter(masks), Fraction(16))
    words = ("--case", case, "--size", "64x64", "--fit", "official")
    text = scail2("masks", "check", *words).stdout
    assert "warning (cropped): The 64x64 frame shows 89 % of the red character" in text
    assert "in frames 7-8 it shows less than 90 % (least: 50 %)" in text
    generate = ("generate", engines, *words, *QUICK, "-o", tmp_path / "a.mp4", "--dry-run")
    assert "in frames 7-8" in scail2(*generate).stdout
    assert "in frames 7-8" in scail2(*generate, "--start", "2").stdout
    assert "cropped" not in scail2(*generate, "--frames", "5").stdout
    assert "Use --fit auto, which moves the window onto the characters (--fit crop)" in text


def test_the_preview_draws_the_window(scail2: Run, tall: Path, edge: Path, tmp_path: Path) -> None:
    """Sheet and video show a border around the visible part; margins enlarge the picture."""
    shapes = {}
    for name, words in {
        "pad": ("--case", tall, "--size", "64x96"),
        "official": ("--case", tall, "--size", "64x96", "--fit", "official"),
        "crop": ("--case", edge, "--size", "96x64"),
    }.items():
        result = scail2("masks", "preview", *words, "-o", tmp_path / name, "--count", 1)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith("framing (")
        video = read_video(tmp_path / name / "masks.mp4")
        shapes[name] = (video.height, video.width)
        assert load_image(tmp_path / name / "masks.png").std() > 5
        if name == "crop":  # the part outside the frame, at the right, is faded to white
            assert video.pixels[0, 60, 160:].min() > 190
            assert video.pixels[0, 60, 60:80].max() < 245
    assert shapes == {"pad": (224, 336), "official": (224, 126), "crop": (126, 224)}


def test_resuming_with_another_fit_is_refused(scail2: Run, engines: Path, tall: Path, tmp_path: Path) -> None:
    words = ("generate", engines, "--case", tall, "--size", "64x96", *QUICK, "-o", tmp_path / "a.mp4", "--resume")
    assert scail2(*words).returncode == 0
    assert "nothing to resume" in scail2(*words).stderr
    assert '--fit was "auto" and is now "pad"' in error_of(scail2(*words, "--fit", "pad"))


def test_a_batch_frames_every_case(scail2: Run, engines: Path, tall: Path, edge: Path, tmp_path: Path) -> None:
    (tmp_path / "batch.txt").write_text(f"a@@{tall}\nb@@{edge}\n")
    words = ("generate", engines, "--batch", tmp_path / "batch.txt", "--size", "64x96", *QUICK, "--json")
    cases = one_json(scail2(*words, "-o", tmp_path / "out"))["cases"]
    assert [[framed["way"] for framed in case["framing"]["inputs"]] for case in cases] == [
        ["pad", "official"],
        ["crop", "pad"],
    ]
    refused = scail2(*words, "-o", tmp_path / "off", "--fit", "official")
    assert refused.returncode == 1
    assert "of the red character" in refused.stderr


def test_fit_without_a_case_is_refused(scail2: Run, tall: Path) -> None:
    assert "--fit applies only to a case" in error_of(scail2("masks", "check", tall / "ref_mask.png", "--fit", "pad"))


# The files of the reports.


def files(folder: Path, *names: str) -> list[object]:
    options = ("--image", "--mask-image", "--driving", "--mask-video")
    return [word for option, name in zip(options, names, strict=True) for word in (option, folder / "media" / name)]


def test_the_reported_phone_clip(scail2: Run, engines: Path, reports: Path, tmp_path: Path) -> None:
    named = files(reports, "ref_landscape.png", "ref_mask_landscape.png", "tall_driving.mp4", "tall_mask.mp4")
    words = ("generate", engines, *named, "--size", "64x96", *QUICK, "-o", tmp_path / "a.mp4")
    assert one_json(scail2(*words, "--json"))["framing"]["inputs"][0]["kept"] == {"red": 1}
    assert "35 % of the red character" in error_of(
        scail2("generate", engines, *named, "--fit", "official", "-o", "b.mp4")
    )


def test_the_reported_character_at_the_edge(scail2: Run, engines: Path, reports: Path, tmp_path: Path) -> None:
    names = ("ref_portrait.png", "ref_mask_portrait_black.png", "edge_driving.mp4", "edge_replace_mask.mp4")
    words = ("generate", engines, *files(reports, *names), "--mode", "replace", "-o", tmp_path / "a.mp4")
    dry = one_json(scail2(*words, "--dry-run", "--json"))
    assert (dry["height"], dry["width"]) == (512, 896)
    assert all(framed["kept"]["red"] > 0.98 for framed in dry["framing"]["inputs"])
    assert "0 % of the red character" in error_of(scail2(*words, "--fit", "official"))


@pytest.mark.parametrize("source", ["drawn", "reported"])
def test_transparent_webm_is_black(
    source: str, scail2: Run, engines: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The transparent part stores bright green, which would be a character that no reference has."""
    if source == "reported":
        clip = request.getfixturevalue("reports") / "media" / "alpha_vp9.webm"
        result = scail2("masks", "check", clip, "--json")
        assert "green" not in one_json(result)["files"][0]["presence"]
        return
    case = write_case(tmp_path / "case", "animate", ((64, 96), STANDING), ((64, 96), STANDING))
    frame = np.full((64, 96, 4), (0, 255, 0, 0), np.uint8)
    frame[8:58, 32:64] = (255, 0, 0, 255)
    options = {"auto-alt-ref": "0", "crf": "4", "b": "2M"}
    frames = np.stack([frame] * FRAMES)
    mask = write_clip(tmp_path / "m.webm", frames, 16, codec="libvpx-vp9", pixel_format="yuva420p", options=options)
    mask.replace(case / "rendered_mask_v2.webm")
    (case / "rendered_mask_v2.mp4").unlink()
    reply = one_json(
        scail2("generate", engines, "--case", case, "--size", "64x96", *QUICK, "-o", tmp_path / "a.mp4", "--json")
    )
    assert reply["framing"]["driving"].keys() == {"red"}
