"""`scail2-rt masks check` and `preview` through the installed command: findings, sheets, and bad input."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scail2_rt.runtime.cli import types
from scail2_rt.runtime.cli.main import cli
from scail2_rt.runtime.masks.lint import Finding
from scail2_rt.runtime.masks.palette import CHARACTERS, PALETTE
from scail2_rt.runtime.media.images import load_mask_image
from scail2_rt.runtime.media.video_reader import probe_video
from tests.support.clips import write_clip
from tests.support.command import Run, error_of, one_json
from tests.support.mask_cases import (
    FRAMES,
    GREY,
    HEIGHT,
    ORANGE,
    WIDTH,
    blocks,
    findings,
    image,
    make_case,
    pixels_of,
    video,
)
from tests.support.mask_damage import figures

pytest_plugins = ["tests.support.runtime_fixtures"]

SUBCOMMANDS = ("check", "preview", "clean", "from-alpha", "from-grey", "from-labels")


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
    assert types.CHARACTERS == CHARACTERS


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
    # name: (change, exit code, rule, frames); the remedy's command is tested below
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
    """The command in the check's remedy is run literally and repairs the case."""
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
        ((".",), "empty.png is empty"),  # a folder is read as the frames of a clip
        (("--case", "case", "--image", "a.png"), "--case and --image were both given"),
        (("--case", "case", "good.png"), "beside a case"),
        (("--image", "a.png", "--driving", "b.mp4"), "--mask-image, --mask-video are missing"),
        (("good.png", "--extra-ref", "a.png", "b.png"), "--extra-ref belongs to a case"),
        (("good.png", "--mode", "replace", "--size", "64x96"), "--mode, --size belongs to a case"),
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


def test_a_finding_is_one_sentence_with_its_remedy() -> None:
    finding = Finding("warning", "rule", "m.png", "Something is so.", "Do this.")
    assert finding.sentence == "Something is so. Do this."
    assert json.dumps(finding.frames) == "[]"
