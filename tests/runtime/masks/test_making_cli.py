"""`scail2-rt masks clean`, `from-alpha`, `from-grey` and `from-labels` through the installed command."""

import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scail2_rt.runtime.masks.palette import PALETTE
from scail2_rt.runtime.media.video_reader import probe_video
from tests.support.clips import write_clip
from tests.support.command import Run, error_of, one_json
from tests.support.mask_cases import FRAMES, HEIGHT, ORANGE, WIDTH, blocks, findings, image, make_case, pixels_of, video
from tests.support.mask_damage import figures

pytest_plugins = ["tests.support.runtime_fixtures"]


# clean


def test_a_damaged_video_is_cleaned_without_loss(scail2: Run, tmp_path: Path) -> None:
    true = np.stack([figures("white", "red", "green", height=128, width=224, phase=phase) for phase in range(4)])
    damaged = write_clip(tmp_path / "m.mp4", true, Fraction(30000, 1001), options={"crf": "23"})
    reply = one_json(scail2("masks", "clean", damaged, "-o", tmp_path / "clean.mp4", "--json"))
    clean = pixels_of(tmp_path / "clean.mp4")
    assert reply["frames"] == 4
    assert set(reply["shares"]) == {"white", "red", "green"}
    assert float((clean != true).any(-1).mean()) < 0.003 < float((pixels_of(damaged) != true).any(-1).mean())
    assert probe_video(tmp_path / "clean.mp4").frame_rate == Fraction(30000, 1001)
    assert findings(scail2, tmp_path / "clean.mp4") == {}


def test_times_of_a_variable_rate_are_kept(scail2: Run, tmp_path: Path) -> None:
    pts = [0, 40, 120, 160, 290]
    clip = video(tmp_path / "m.mp4", *[blocks("black", "red")] * 5, pts=pts, time_base=Fraction(1, 1000))
    assert scail2("masks", "clean", clip, "-o", tmp_path / "clean.mp4").returncode == 0
    assert probe_video(tmp_path / "clean.mp4").timestamps == tuple(Fraction(time, 1000) for time in pts)


def test_an_animated_webp_is_a_clip(scail2: Run, tmp_path: Path) -> None:
    frames = [blocks("black", "red"), blocks("black", "red", "green"), blocks("black", "green")]
    first, *others = [Image.fromarray(frame) for frame in frames]
    clip, output = tmp_path / "m.webp", tmp_path / "m.mp4"
    first.save(clip, save_all=True, append_images=others, duration=80, lossless=True)
    reply = one_json(scail2("masks", "check", clip, "--json"))
    assert reply["files"][0]["frames"] == 3
    assert scail2("masks", "clean", clip, "-o", output).returncode == 0
    assert np.array_equal(pixels_of(output), np.stack(frames))
    assert probe_video(output).frame_rate == Fraction(25, 2)
    still = image(tmp_path / "one.webp", frames[0])
    assert scail2("masks", "clean", still, "-o", tmp_path / "one.png").returncode == 0


def test_clean_maps_colours_swaps_the_background_and_removes_specks(scail2: Run, tmp_path: Path) -> None:
    spotted = blocks("white", "red", ORANGE)
    spotted[2:4, 2:5] = PALETTE["cyan"]
    mask = image(tmp_path / "m.png", spotted)
    words = ("masks", "clean", mask, "-o", tmp_path / "out.png")
    assert "--map 255,140,0=COLOUR" in error_of(scail2(*words))
    assert not (tmp_path / "out.png").exists()
    result = scail2(*words, "--map", "255,140,0=blue", "--background", "black", "--speck", "7")
    assert result.returncode == 0, result.stderr
    assert (pixels_of(tmp_path / "out.png") == blocks("black", "red", "blue")).all()
    assert "red 7.8 %, blue 7.8 %, black" in result.stdout
    assert "--overwrite" in error_of(scail2(*words, "--map", "255,140,0=blue"))
    words = (*words, "--overwrite", "--map", "255,140,0=red", "--map", "255,0,0=green", "--speck", "0")
    assert scail2(*words).returncode == 0
    assert {tuple(pixel) for pixel in pixels_of(tmp_path / "out.png").reshape(-1, 3).tolist()} == {
        PALETTE[name] for name in ("white", "red", "green", "cyan")
    }


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("m.png", "-o", "m.png"), "is the input"),
        (("m.png", "-o", "out.jpg"), "must end in .png"),
        (("m.mp4", "-o", "out.png"), "must end in .mp4"),
        (("m.png", "-o", "folder.png"), "is a folder"),
        (("m.png", "-o", "text/out.png"), "output text/out.png cannot be written because text is a file"),
        (("m.png", "-o", "out.png", "--fps", "25"), "--fps is for a folder"),
        (("m.png", "-o", "out.png", "--fps", "x"), "'x' is not a frame rate"),
        (("nothing", "-o", "out.mp4"), "holds no image"),
        (("sizes", "-o", "out.mp4"), "Frame 1 of sizes is 64x60"),
        (("m.png", "-o", "out.png", "--map", "1,2=red"), "does not start with a colour"),
        (("m.png", "-o", "out.png", "--map", "1,2,300=red"), "does not start with a colour"),
        (("m.png", "-o", "out.png", "--map", "1,2,3=pink"), "'pink' is not a mask colour"),
        (("m.png", "-o", "out.png", "--speck", "-1"), "-1 is not in the range"),
        (("m.png", "-o", "out.png", "--background", "red"), "'red' is not one of"),
        (("m.png",), "Missing option '-o'"),
    ],
)
def test_bad_input_of_clean(scail2: Run, tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    image(tmp_path / "m.png", blocks("white", "red"))
    video(tmp_path / "m.mp4", *[blocks("white", "red")] * 2)
    for folder in ("folder.png", "nothing", "sizes"):
        (tmp_path / folder).mkdir()
    (tmp_path / "text").touch()
    image(tmp_path / "sizes" / "1.png", blocks("white", "red"))
    image(tmp_path / "sizes" / "2.png", blocks("white", "red")[:, :60])
    before = sorted(tmp_path.rglob("*"))
    assert says in error_of(scail2("masks", "clean", *words, cwd=tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


# from-alpha, from-grey, from-labels


def test_from_alpha(scail2: Run, tmp_path: Path) -> None:
    layers = np.full((HEIGHT, WIDTH, 4), 200, np.uint8)
    inside = (blocks("black", "red") == PALETTE["red"]).all(-1)
    layers[..., 3] = np.where(inside, 180, 60)
    picture = image(tmp_path / "a.png", layers)
    for mode, role, background in (
        ("animate", "reference", "white"),
        ("replace", "reference", "black"),
        ("animate", "driving", "black"),
        ("replace", "driving", "white"),
    ):
        words = ("masks", "from-alpha", picture, "-o", tmp_path / "m.png", "--mode", mode, "--overwrite")
        assert scail2(*words, "--role", role, "--color", "blue").returncode == 0
        assert (pixels_of(tmp_path / "m.png") == blocks(background, "blue")).all()
    assert scail2(*words).returncode == 0  # an image is a reference; the default colour is red
    assert (pixels_of(tmp_path / "m.png") == blocks("black", "red")).all()
    assert "the character is nowhere" in error_of(scail2(*words, "--threshold", "200"))
    assert "the character is everywhere" in error_of(scail2(*words, "--threshold", "60"))


def test_from_alpha_without_alpha(scail2: Run, tmp_path: Path) -> None:
    words = ("-o", "m.png", "--mode", "animate")
    image(tmp_path / "rgb.png", blocks("white", "red"))
    assert "has no alpha channel" in error_of(scail2("masks", "from-alpha", "rgb.png", *words, cwd=tmp_path))
    video(tmp_path / "v.mp4", *[blocks("white", "red")] * 2)
    message = error_of(scail2("masks", "from-alpha", "v.mp4", "-o", "m.mp4", "--mode", "animate", cwd=tmp_path))
    assert "v.mp4 has no alpha channel" in message
    assert "from-grey" in message
    assert "Missing option '--mode'" in error_of(scail2("masks", "from-alpha", "rgb.png", "-o", "m.png", cwd=tmp_path))


ALPHA_CODECS: dict[str, dict[str, Any]] = {
    "prores.mov": {"codec": "prores_ks", "pixel_format": "yuva444p10le", "options": {"profile": "4444"}},
    "animation.mov": {"codec": "qtrle", "pixel_format": "argb", "options": {}},
    "png.mov": {"codec": "png", "pixel_format": "rgba", "options": {}},
    "vp8.webm": {"codec": "libvpx", "pixel_format": "yuva420p", "options": {"auto-alt-ref": "0", "b": "1000000"}},
    "vp9.webm": {"codec": "libvpx-vp9", "pixel_format": "yuva420p", "options": {"auto-alt-ref": "0", "b": "1000000"}},
    "a.webp": {},
    "a.gif": {},
}


@pytest.mark.parametrize("name", ALPHA_CODECS)
def test_from_alpha_of_a_video(scail2: Run, tmp_path: Path, name: str) -> None:
    """Alpha of 255, 0 and on both sides of the threshold; the colours must have no effect."""
    layers = np.full((4, HEIGHT, WIDTH, 4), (250, 10, 250, 0), np.uint8)
    for frame, left in zip(layers, (8, 16, 24, 32), strict=True):
        frame[12:52, left : left + 40] = (40, 200, 90, 255)
        if name != "a.gif":  # a GIF has opaque and transparent pixels only
            frame[12:52, left : left + 8, 3], frame[12:52, left + 8 : left + 16, 3] = 100, 160
    stills = [Image.fromarray(frame) for frame in layers]
    if options := ALPHA_CODECS[name]:
        write_clip(tmp_path / name, layers, 16, **options)
    elif name == "a.webp":
        stills[0].save(tmp_path / name, save_all=True, append_images=stills[1:], duration=60, lossless=True)
    else:
        stills[0].save(tmp_path / name, save_all=True, append_images=stills[1:], duration=60, disposal=2)
    result = scail2("masks", "from-alpha", tmp_path / name, "-o", tmp_path / "m.mp4", "--mode", "animate")
    assert result.returncode == 0, result.stderr
    expected = np.where(layers[..., 3:] >= 128, PALETTE["red"], PALETTE["black"])
    wrong = (pixels_of(tmp_path / "m.mp4") != expected).any(-1)
    assert float(wrong.mean()) <= (0.002 if name.endswith(".webm") else 0)


def test_from_alpha_of_a_folder(scail2: Run, tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    for number in range(11):  # frame 10 must come after frame 9
        layers = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
        layers[4 * number : 4 * number + 8, 10:40, 3] = 255
        image(tmp_path / "frames" / f"f{number}.png", layers)
    words = ("-o", tmp_path / "m.mp4", "--mode", "replace", "--fps", "30000/1001", "--json")
    reply = one_json(scail2("masks", "from-alpha", tmp_path / "frames", *words))
    assert (reply["frames"], set(reply["shares"])) == (11, {"white", "red"})
    assert probe_video(tmp_path / "m.mp4").frame_rate == Fraction(30000, 1001)
    for number, frame in enumerate(pixels_of(tmp_path / "m.mp4")):
        assert np.flatnonzero((frame == PALETTE["red"]).all(-1).any(1)).tolist() == list(
            range(4 * number, 4 * number + 8)
        )


def test_from_grey(scail2: Run, tmp_path: Path) -> None:
    frames = [np.where(blocks("black", "red", *["red"] * (i % 2)).any(-1, keepdims=True), 220, 20) for i in range(4)]
    matte = [np.repeat(frame, 3, -1).astype(np.uint8) for frame in frames]
    clip = write_clip(tmp_path / "matte.mp4", np.stack(matte), 16, options={"crf": "18"})
    words = ("masks", "from-grey", clip, "-o", tmp_path / "m.mp4", "--mode", "animate", "--colour", "cyan")
    assert scail2(*words).returncode == 0
    expected = np.stack([blocks("black", "cyan", *["cyan"] * (i % 2)) for i in range(4)])
    assert (pixels_of(tmp_path / "m.mp4") == expected).all()
    still = image(tmp_path / "matte.png", 255 - matte[0])
    words = ("masks", "from-grey", still, "-o", tmp_path / "m.png", "--mode", "animate")
    assert scail2(*words, "--invert", "--threshold", "100").returncode == 0
    assert (pixels_of(tmp_path / "m.png") == blocks("white", "red")).all()
    deep = Image.fromarray((np.asarray(matte[1])[..., 0].astype(np.uint16)) * 257)
    deep.save(tmp_path / "deep.png")
    assert scail2("masks", "from-grey", tmp_path / "deep.png", *words[3:], "--overwrite").returncode == 0
    assert (pixels_of(tmp_path / "m.png") == blocks("white", "red", "red")).all()


def test_from_grey_of_unusable_files(scail2: Run, tmp_path: Path) -> None:
    words = ("-o", tmp_path / "m.png", "--mode", "animate")
    colour = image(tmp_path / "colour.png", blocks("white", "red"))
    assert "is in colour" in error_of(scail2("masks", "from-grey", colour, *words))
    black = image(tmp_path / "black.png", blocks("black"))
    assert "levels from 0 to 0" in error_of(scail2("masks", "from-grey", black, *words))
    assert "--invert" not in error_of(scail2("masks", "from-grey", black, *words, "--threshold", "0"))
    assert not (tmp_path / "m.png").exists()


def labels(*values: int) -> np.ndarray:
    """One block per label on background 0."""
    frame = np.zeros((HEIGHT, WIDTH), np.uint8)
    for i, value in enumerate(values):
        frame[12:52, 6 + 15 * i : 18 + 15 * i] = value
    return frame


def test_from_labels_of_an_indexed_image(scail2: Run, tmp_path: Path) -> None:
    indexed = Image.fromarray(labels(1, 2, 3), "P")
    indexed.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])  # the palette of the DAVIS data set
    indexed.save(tmp_path / "labels.png")
    words = (
        "masks",
        "from-labels",
        tmp_path / "labels.png",
        "-o",
        tmp_path / "m.png",
        "--mode",
        "animate",
        "--overwrite",
    )
    assert scail2(*words).returncode == 0
    assert (pixels_of(tmp_path / "m.png") == blocks("white", "red", "green", "blue")).all()
    assert scail2(*words, "--order", "green,red,cyan", "--role", "driving").returncode == 0
    assert (pixels_of(tmp_path / "m.png") == blocks("black", "green", "red", "cyan")).all()
    assert scail2(*words, "--order", "3=yellow,1=background,2=red").returncode == 0
    assert (pixels_of(tmp_path / "m.png") == blocks("white", "white", "red", "yellow")).all()
    message = error_of(scail2(*words, "--order", "green,red"))
    assert "does not name: 3" in message
    assert "--order 3=red" in message


def test_a_label_keeps_its_colour_without_the_others(scail2: Run, tmp_path: Path) -> None:
    Image.fromarray(labels(2)).save(tmp_path / "labels.png")
    words = ("masks", "from-labels", tmp_path / "labels.png", "-o", tmp_path / "m.png", "--mode", "replace")
    assert scail2(*words).returncode == 0
    assert (pixels_of(tmp_path / "m.png") == blocks("black", "green")).all()


@pytest.mark.parametrize("codec", ["ffv1", "libx264"])
def test_from_labels_of_a_video(scail2: Run, tmp_path: Path, codec: str) -> None:
    values = (1, 2) if codec == "ffv1" else (120, 255)
    frames = np.repeat(np.stack([labels(*values), labels(values[0]), labels(*values)])[..., None], 3, -1)
    if codec == "ffv1":
        clip = write_clip(tmp_path / "l.mkv", frames, 16, codec="ffv1", pixel_format="gray", options={})
    else:
        clip = write_clip(tmp_path / "l.mp4", frames, 16, options={"crf": "18"})
    order = "--order", f"{values[0]}=magenta,{values[1]}=blue"
    words = ("masks", "from-labels", clip, "-o", tmp_path / "m.mp4", "--mode", "replace", *order)
    result = scail2(*words)
    assert result.returncode == 0, result.stderr
    expected = np.stack([blocks("white", "magenta", *["blue"] * (i != 1)) for i in range(3)])
    assert float((pixels_of(tmp_path / "m.mp4") != expected).any(-1).mean()) < (0.0001 if codec == "ffv1" else 0.002)
    message = error_of(scail2(*words[:-1], f"{values[0]}=red", "--overwrite"))
    named = int(message.split("does not name: ")[1].split(".")[0])  # a blurred label is named once
    assert abs(named - values[1]) <= 3


@pytest.mark.parametrize(
    ("order", "says"),
    [
        ("red,pink", "'pink' is not a mask colour"),
        ("red,red", "two labels the colour red"),
        ("1=red,1=blue", "the label 1 two colours"),
        ("x=red", "'x' is not a label number"),
        ("", "'' is not a mask colour"),
        ("7=red,1=background", "does not name: 2"),
        ("1=background,2=background", "holds background only"),
    ],
)
def test_bad_orders(scail2: Run, tmp_path: Path, order: str, says: str) -> None:
    Image.fromarray(labels(1, 2)).save(tmp_path / "labels.png")
    words = ("masks", "from-labels", tmp_path / "labels.png", "-o", tmp_path / "m.png", "--mode", "animate")
    assert says in error_of(scail2(*words, "--order", order))
    assert [path.name for path in tmp_path.iterdir()] == ["labels.png"]


def test_labels_in_colour_are_refused(scail2: Run, tmp_path: Path) -> None:
    picture = image(tmp_path / "rgb.png", blocks("white", "red"))
    words = ("masks", "from-labels", picture, "-o", tmp_path / "m.png", "--mode", "animate")
    message = error_of(scail2(*words))
    assert "is in colour" in message
    assert "masks clean" in message


def test_a_case_made_by_the_commands_has_no_finding(scail2: Run, tmp_path: Path) -> None:
    """A label image and a folder of label frames, as segmentation tools write them, become a case."""
    case = make_case(tmp_path / "case", "replace")
    Image.fromarray(labels(1, 2)).save(tmp_path / "ref.png")
    (tmp_path / "clip").mkdir()
    for number in range(FRAMES):
        Image.fromarray(labels(1, 2)).save(tmp_path / "clip" / f"{number:05}.png")
    for source, output in (("ref.png", "ref_mask.png"), ("clip", "replace_mask.mp4")):
        words = ("masks", "from-labels", tmp_path / source, "-o", case / output, "--mode", "replace", "--overwrite")
        fps = ("--fps", "16") if source == "clip" else ()
        assert scail2(*words, "--order", "red,green", *fps).returncode == 0
    assert findings(scail2, "--case", case) == {}
    shutil.rmtree(case)
