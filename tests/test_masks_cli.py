"""`scail2-rt masks` through the installed command: every subcommand and option, what it finds, and bad input."""

import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scail2_rt.runtime import mask_commands
from scail2_rt.runtime.cli import cli
from scail2_rt.runtime.mask_lint import Finding
from scail2_rt.runtime.masks import CHARACTERS, PALETTE
from scail2_rt.runtime.media import VideoReader, load_mask_image, probe_video
from tests.clips import write_clip
from tests.command import Run, error_of, one_json
from tests.mask_damage import figures

pytest_plugins = ["tests.runtime_fixtures"]

HEIGHT, WIDTH, FRAMES = 64, 96, 12
LOSSLESS: dict[str, Any] = {"codec": "libx264rgb", "pixel_format": "rgb24", "options": {"crf": "0"}}
ORANGE, GREY = (255, 140, 0), (128, 128, 128)
SUBCOMMANDS = ("check", "preview", "clean", "from-alpha", "from-grey", "from-labels")


def blocks(background: str, *colours: Any) -> np.ndarray:
    """A mask with one block a colour, 40 rows high, from left to right."""
    frame = np.full((HEIGHT, WIDTH, 3), PALETTE[background], np.uint8)
    for i, colour in enumerate(colours):
        frame[12:52, 6 + 15 * i : 18 + 15 * i] = PALETTE[colour] if isinstance(colour, str) else colour
    return frame


def image(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels).save(path)
    return path


def video(path: Path, *frames: np.ndarray, **options: Any) -> Path:
    return write_clip(path, np.stack(frames), 16, **{**LOSSLESS, **options})


def pixels_of(path: Path) -> np.ndarray:
    """As the runtime reads it: [H, W, 3] of an image, [T, H, W, 3] of a video."""
    if path.suffix == ".png":
        return load_mask_image(path)
    with VideoReader(path) as reader:
        return reader.read(1000)


def make_case(folder: Path, mode: str = "animate", **changes: Any) -> Path:
    """A good case of red and green blocks; `ref`, `driving` and `image` replace a mask, its frames, or the image."""
    folder.mkdir()
    here, there = ("white", "black") if mode == "animate" else ("black", "white")
    image(folder / "ref.png", changes.get("image", blocks("white", (90, 60, 30), (20, 90, 80))))
    image(folder / "ref_mask.png", changes.get("ref", blocks(here, "red", "green")))
    frames = changes.get("driving", [blocks(there, "red", "green")] * FRAMES)
    video(folder / "rendered_v2.mp4", *[blocks("white", (90, 60, 30))] * changes.get("frames", FRAMES))
    video(folder / ("rendered_mask_v2.mp4" if mode == "animate" else "replace_mask.mp4"), *frames)
    return folder


def findings(scail2: Run, *words: object, code: int = 0) -> dict[str, dict[str, Any]]:
    """The findings of `masks check --json`, by rule."""
    result = scail2("masks", "check", *words, "--json")
    assert result.returncode == code, result.stderr
    reply = one_json(result)
    assert reply["usable"] == (code == 0)
    assert reply["errors"] == sum(finding["severity"] == "error" for finding in reply["findings"])
    return {finding["rule"]: finding for finding in reply["findings"]}


# help


def test_the_group_lists_its_commands(scail2: Run) -> None:
    text = scail2("masks").stdout
    assert scail2("masks", "--help").stdout == text
    assert [name for name in SUBCOMMANDS if name not in text] == []
    assert "masks" in scail2("--help").stdout


@pytest.mark.parametrize("command", SUBCOMMANDS)
def test_help_lists_every_option(scail2: Run, command: str) -> None:
    result = scail2("masks", command, "--help")
    assert result.returncode == 0
    options = [name for parameter in cli.commands["masks"].commands[command].params for name in parameter.opts]  # type: ignore[attr-defined]
    assert [name for name in options if name.startswith("--") and name not in result.stdout] == []
    assert "--json" in options


def test_option_values_are_those_of_the_modules() -> None:
    assert mask_commands.CHARACTERS == CHARACTERS


# check


@pytest.mark.parametrize("mode", ["animate", "replace"])
def test_a_good_case_has_no_finding(scail2: Run, tmp_path: Path, mode: str) -> None:
    case = make_case(tmp_path / "case", mode)
    result = scail2("masks", "check", "--case", case, "--size", "64x96")
    assert result.returncode == 0, result.stderr
    assert "nothing was found" in result.stdout
    reply = one_json(scail2("masks", "check", "--case", case, "--size", "64x96", "--json"))
    assert (reply["mode"], reply["findings"], reply["framing"]["ratio"]) == (mode, [], 1)
    driving = reply["files"][1]
    assert (driving["frames"], driving["height"], driving["width"]) == (FRAMES, HEIGHT, WIDTH)
    assert driving["shares"]["red"] == pytest.approx(40 * 12 / HEIGHT / WIDTH)
    assert (driving["unclear"], driving["inexact"]) == (0, 0)
    assert driving["presence"] == {"red": [[0, FRAMES - 1]], "green": [[0, FRAMES - 1]]}


def test_four_files_and_an_extra_reference(scail2: Run, tmp_path: Path) -> None:
    case = make_case(tmp_path / "case", ref=blocks("white", "red"))
    names = {"--image": "ref.png", "--mask-image": "ref_mask.png", "--driving": "rendered_v2.mp4"}
    words = [word for name, file in names.items() for word in (name, case / file)]
    words += ["--mask-video", case / "rendered_mask_v2.mp4"]
    assert "green character in frames 0-11" in findings(scail2, *words, code=2)["no reference"]["says"]
    view = image(tmp_path / "view.png", blocks("white", "green"))
    assert findings(scail2, *words, "--extra-ref", case / "ref.png", view) == {}
    reply = findings(scail2, *words, "--extra-ref", case / "ref.png", view, "--mode", "replace")
    assert set(reply) == {"background"}


BAD: dict[str, tuple[dict[str, Any], int, str, Any]] = {
    # name: (what is changed, exit code, rule, frames); the remedy's command is tested below
    "wrong colour": ({"ref": blocks("white", "red", ORANGE)}, 2, "wrong colour", []),
    "wrong colour in a video": (
        {"driving": [*[blocks("black", "red")] * 3, *[blocks("black", "red", ORANGE)] * 2, blocks("black", "red")]},
        2,
        "wrong colour",
        [[3, 4]],
    ),
    "no colour": ({"ref": blocks("black")}, 2, "no colour", []),
    "no character": ({"driving": [blocks("white")] * FRAMES}, 2, "no character", []),
    "frame count": ({"frames": FRAMES + 4}, 2, "frame count", [[12, 15]]),
    "size": ({"image": blocks("white", "red")[:, :60]}, 2, "size", []),
    "grey": ({"driving": [blocks("black", "red", "green", GREY)] * FRAMES}, 0, "grey", [[0, 11]]),
    "white background": ({"driving": [blocks("white", "red", "green")] * FRAMES}, 0, "background", []),
    "never driven": ({"driving": [blocks("black", "red")] * FRAMES}, 0, "never driven", []),
    "flicker": (
        {"driving": [blocks("black", "red", *["green"] * (i not in (2, 5, 6, 7))) for i in range(FRAMES)]},
        0,
        "flicker",
        [[2, 2], [5, 7]],
    ),
    "swapped colours": (
        {"driving": [blocks("black", *["red", "green"][:: -1 if i == 6 else 1]) for i in range(FRAMES)]},
        0,
        "colour change",
        [[6, 7]],
    ),
    "absence": (
        {"driving": [blocks("black", *["red", "green"] * (i < 9)) for i in range(FRAMES)]},
        0,
        "absence",
        [[9, 11]],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_found_with_its_frames(scail2: Run, tmp_path: Path, name: str) -> None:
    changes, code, rule, frames = BAD[name]
    changes = {**changes, "frames": changes.get("frames", len(changes.get("driving", [0] * FRAMES)))}
    found = findings(scail2, "--case", make_case(tmp_path / "case", **changes), code=code)
    assert found[rule]["frames"] == frames
    assert found[rule]["severity"] == ("error" if code else "warning")
    assert found[rule]["remedy"]


def test_another_size_of_the_same_shape_is_a_note(scail2: Run, tmp_path: Path) -> None:
    double = np.repeat(np.repeat(blocks("white", "red", "green"), 2, 0), 2, 1)
    found = findings(scail2, "--case", make_case(tmp_path / "case", ref=double))
    assert (set(found), found["size"]["severity"]) == ({"size"}, "note")
    assert "is 128x192 and its picture 64x96" in found["size"]["says"]


def test_a_character_that_walks_out_is_no_flicker(scail2: Run, tmp_path: Path) -> None:
    frames = [blocks("black", "red", *["green"] * (not 5 <= i < 16)) for i in range(20)]
    assert findings(scail2, "--case", make_case(tmp_path / "case", driving=frames, frames=20)) == {}


def test_an_occlusion_is_no_change_of_colour(scail2: Run, tmp_path: Path) -> None:
    frames = []
    for left in range(0, 84, 7):
        frame = blocks("black", "red")
        frame[8:56, left : left + 14] = PALETTE["green"]
        frames.append(frame)
    assert "colour change" not in findings(scail2, "--case", make_case(tmp_path / "case", driving=frames))


def test_the_remedy_of_a_wrong_colour_works(scail2: Run, tmp_path: Path) -> None:
    """What the check says is done, word for word, and mends the case."""
    case = make_case(tmp_path / "case", ref=blocks("white", "red", ORANGE))
    remedy = findings(scail2, "--case", case, code=2)["wrong colour"]["remedy"]
    words = remedy.split("`")[1].replace("COLOUR", "green").split()
    assert words[:3] == ["scail2-rt", "masks", "clean"]
    assert scail2(*words[1:]).returncode == 0
    (case / "ref_mask_clean.png").replace(case / "ref_mask.png")
    assert findings(scail2, "--case", case) == {}


def test_coding_damage_is_told_by_its_size(scail2: Run, tmp_path: Path) -> None:
    small = np.stack([figures("white", "red", "green", height=256, width=448)] * 2)
    light = write_clip(tmp_path / "light.mp4", small, options={"crf": "23"})
    found = findings(scail2, light)
    assert set(found) == {"coding noise"}
    assert found["coding noise"]["severity"] == "note"
    soft = np.asarray(Image.fromarray(small[0]).resize((112, 64), 2).resize((448, 256), 2))
    found = findings(scail2, image(tmp_path / "soft.png", soft))
    assert set(found) == {"soft edges"}
    assert "masks clean" in found["soft edges"]["remedy"]


def test_mask_files_by_themselves(scail2: Run, tmp_path: Path) -> None:
    good = image(tmp_path / "good.png", blocks("white", "red"))
    clip = video(tmp_path / "clip.mp4", *[blocks("black", "red", ORANGE)] * 3)
    result = scail2("masks", "check", good, clip)
    assert result.returncode == 2
    assert result.stderr == ""
    assert [name in result.stdout for name in ("good.png: 64x96", "clip.mp4: 64x96, 3 frames")] == [True, True]
    assert "error (wrong colour)" in result.stdout
    assert "these masks cannot be used (1 error)" in result.stdout
    assert scail2("masks", "check", good).returncode == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "nothing to check"),
        (("--case", "nowhere"), "does not exist"),
        (("nowhere.png",), "does not exist"),
        (("text.mp4",), "cannot be opened as a video"),
        (("text.png",), "not an image"),
        (("empty.png",), "empty"),
        ((".",), "is a folder"),
        (("--case", "case", "--image", "a.png"), "--case and single files"),
        (("--case", "case", "good.png"), "beside a case"),
        (("--image", "a.png", "--driving", "b.mp4"), "--mask-image, --mask-video is missing"),
        (("good.png", "--extra-ref", "a.png", "b.png"), "--extra-ref belongs to a case"),
        (("--case", "case", "--size", "70x96"), "divisible by 32"),
        (("--mode", "both"), "'both' is not one of"),
    ],
)
def test_bad_input_of_check(scail2: Run, tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    make_case(tmp_path / "case")
    image(tmp_path / "good.png", blocks("white", "red"))
    for name in ("text.mp4", "text.png"):
        (tmp_path / name).write_text("neither\n" * 50)
    (tmp_path / "empty.png").touch()
    assert says in error_of(scail2("masks", "check", *words, cwd=tmp_path))


def test_an_error_with_json_is_one_object(scail2: Run, tmp_path: Path) -> None:
    result = scail2("masks", "clean", tmp_path / "none.png", "-o", tmp_path / "a.png", "--json")
    assert result.returncode == 2
    assert "does not exist" in one_json(result)["error"]


# preview


def test_preview_of_a_case(scail2: Run, tmp_path: Path) -> None:
    frames = [blocks("black", "red", *["green"] * (i != 5), *[GREY] * (i == 7)) for i in range(FRAMES)]
    case = make_case(tmp_path / "case", driving=frames)
    words = ("masks", "preview", "--case", case, "-o", tmp_path / "out", "--count", "4", "--json")
    reply = one_json(scail2(*words))
    assert {finding["rule"] for finding in reply["check"]["findings"]} == {"flicker", "grey"}
    sheet = load_mask_image(Path(reply["sheet"]))
    assert sheet.shape[0] > 600
    assert sheet.shape[1] > 800
    assert ((sheet == (255, 120, 0)).all(-1)).any()  # frame 7 is on it, with its grey in orange
    assert ((sheet == (205, 0, 0)).all(-1)).any()  # and framed in red
    info = probe_video(Path(reply["video"]))
    assert (info.frames, info.height, info.width, info.frame_rate) == (FRAMES, HEIGHT, WIDTH, 16)
    red, hidden = pixels_of(Path(reply["video"]))[0][32, 12], pixels_of(Path(reply["video"]))[0][32, 90]
    assert red[0] > red[1] + 60
    assert hidden.max() < 160
    assert "--overwrite" in error_of(scail2(*words[:-1]))
    assert scail2(*words[:-1], "--overwrite").returncode == 0


def test_preview_of_mask_files(scail2: Run, tmp_path: Path) -> None:
    still = image(tmp_path / "m.png", blocks("white", "red")[:63, :95])  # odd sides
    clip = video(tmp_path / "m.mp4", *[blocks("black", "blue")[:63, :95]] * 3)
    result = scail2("masks", "preview", still, clip, "-o", tmp_path / "both")
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["masks.mp4", "masks.png"]
    assert scail2("masks", "preview", still, "-o", tmp_path / "one").returncode == 0
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["masks.png"]
    assert "one at a time" in error_of(scail2("masks", "preview", clip, clip, "-o", tmp_path / "two"))
    (tmp_path / "file").touch()
    assert "is a file" in error_of(scail2("masks", "preview", clip, "-o", tmp_path / "file"))
    assert "0 is not in the range" in error_of(scail2("masks", "preview", clip, "-o", tmp_path / "c", "--count", "0"))


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
        (("m.png", "-o", "text/out.png"), "is a file"),
        (("m.png", "-o", "out.png", "--fps", "25"), "--fps is for a folder"),
        (("m.png", "-o", "out.png", "--fps", "x"), "'x' is not a frame rate"),
        (("nothing", "-o", "out.mp4"), "holds no image"),
        (("sizes", "-o", "out.mp4"), "Frame 1 of sizes is 64x60"),
        (("m.png", "-o", "out.png", "--map", "1,2=red"), "does not begin with a colour"),
        (("m.png", "-o", "out.png", "--map", "1,2,300=red"), "does not begin with a colour"),
        (("m.png", "-o", "out.png", "--map", "1,2,3=pink"), "'pink' is none of"),
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
    assert scail2(*words).returncode == 0  # an image is a reference, and red
    assert (pixels_of(tmp_path / "m.png") == blocks("black", "red")).all()
    assert "nothing of it the character" in error_of(scail2(*words, "--threshold", "200"))
    assert "all of it the character" in error_of(scail2(*words, "--threshold", "60"))


def test_from_alpha_of_what_has_none(scail2: Run, tmp_path: Path) -> None:
    words = ("-o", "m.png", "--mode", "animate")
    image(tmp_path / "rgb.png", blocks("white", "red"))
    assert "has no alpha channel" in error_of(scail2("masks", "from-alpha", "rgb.png", *words, cwd=tmp_path))
    video(tmp_path / "v.mp4", *[blocks("white", "red")] * 2)
    message = error_of(scail2("masks", "from-alpha", "v.mp4", "-o", "m.mp4", "--mode", "animate", cwd=tmp_path))
    assert "is no image" in message
    assert "from-grey" in message
    assert "Missing option '--mode'" in error_of(scail2("masks", "from-alpha", "rgb.png", "-o", "m.png", cwd=tmp_path))


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


def test_from_grey_of_what_is_none(scail2: Run, tmp_path: Path) -> None:
    words = ("-o", tmp_path / "m.png", "--mode", "animate")
    colour = image(tmp_path / "colour.png", blocks("white", "red"))
    assert "is in colour" in error_of(scail2("masks", "from-grey", colour, *words))
    black = image(tmp_path / "black.png", blocks("black"))
    assert "levels from 0 to 0" in error_of(scail2("masks", "from-grey", black, *words))
    assert "--invert" not in error_of(scail2("masks", "from-grey", black, *words, "--threshold", "0"))
    assert not (tmp_path / "m.png").exists()


def labels(*values: int) -> np.ndarray:
    """One block a label on 0."""
    frame = np.zeros((HEIGHT, WIDTH), np.uint8)
    for i, value in enumerate(values):
        frame[12:52, 6 + 15 * i : 18 + 15 * i] = value
    return frame


def test_from_labels_of_an_indexed_image(scail2: Run, tmp_path: Path) -> None:
    indexed = Image.fromarray(labels(1, 2, 3), "P")
    indexed.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])  # as DAVIS colours its labels
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
    named = int(message.split("does not name: ")[1].split(".")[0])  # one label, however much it was blurred
    assert abs(named - values[1]) <= 3


@pytest.mark.parametrize(
    ("order", "says"),
    [
        ("red,pink", "'pink' is none of"),
        ("red,red", "two labels the colour red"),
        ("1=red,1=blue", "the label 1 two colours"),
        ("x=red", "'x' is not a label number"),
        ("", "'' is none of"),
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
    assert "colour picture" in message
    assert "masks clean" in message


def test_a_case_made_by_the_tools_has_no_finding(scail2: Run, tmp_path: Path) -> None:
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


def test_a_finding_is_one_sentence_with_its_remedy() -> None:
    finding = Finding("warning", "rule", "m.png", "Something is so.", "Do this.")
    assert finding.sentence == "Something is so. Do this."
    assert json.dumps(finding.frames) == "[]"
