"""`masks check` on useless masks (fragments, holes, jumps in area), and on good masks that resemble them."""

from pathlib import Path

import numpy as np
import pytest

from scail2_rt.runtime.masks.palette import PALETTE
from tests.support.command import Run
from tests.support.mask_cases import FRAMES, HEIGHT, WIDTH, blocks, findings, image, make_case, video

pytest_plugins = ["tests.support.runtime_fixtures"]

SHAPES = ("fragments", "holes", "area jump")


def square(side: int = 44, background: str = "black") -> np.ndarray:
    """A red square of 44 pixels, large enough for holes."""
    frame = np.full((HEIGHT, WIDTH, 3), PALETTE[background], np.uint8)
    frame[6 : 6 + side, 8 : 8 + side] = PALETTE["red"]
    return frame


def islands(frame: np.ndarray) -> np.ndarray:
    """Add 21 islands of 12 pixels."""
    spoiled = frame.copy()
    for i in range(21):
        y, x = 4 + 8 * (i % 7), 58 + 12 * (i // 7)
        spoiled[y : y + 3, x : x + 4] = PALETTE["red"]
    return spoiled


def perforated(frame: np.ndarray) -> np.ndarray:
    """Add 16 holes of 9 pixels."""
    spoiled, background = frame.copy(), frame[0, 0]
    for i in range(16):
        y, x = 10 + 10 * (i // 4), 12 + 10 * (i % 4)
        spoiled[y : y + 3, x : x + 3] = background
    return spoiled


def peppered(frame: np.ndarray) -> np.ndarray:
    """With single pixels in and beside the square, every fourth of every second row."""
    spoiled = frame.copy()
    spoiled[1::2, 1::4] = np.where(frame[1::2, 1::4].any(-1, keepdims=True), 0, PALETTE["red"])
    return spoiled


def exchanged(frame: np.ndarray) -> np.ndarray:
    return np.where(frame.any(-1, keepdims=True), 0, PALETTE["red"]).astype(np.uint8)


@pytest.mark.parametrize(("rule", "spoil"), [("fragments", islands), ("holes", perforated), ("noise", peppered)])
def test_the_remedy_repairs_fragments_holes_and_noise(scail2: Run, tmp_path: Path, rule: str, spoil: object) -> None:
    frames = [spoil(square()) if i in (4, 5, 9) else square() for i in range(FRAMES)]  # type: ignore[operator]
    clip = video(tmp_path / "clip.mp4", *frames)
    found = findings(scail2, clip)
    assert set(found) == {rule}
    assert found[rule]["frames"] == [[4, 5], [9, 9]]
    assert found[rule]["severity"] == "warning"
    assert "The red character of" in found[rule]["says"]
    assert "in frames 4-5, 9" in found[rule]["says"]
    words = found[rule]["remedy"].split("`")[1].split()
    assert words[:3] == ["scail2-rt", "masks", "clean"]
    assert scail2(*words[1:]).returncode == 0
    assert findings(scail2, tmp_path / "clip_clean.mp4") == {}


def test_a_character_that_is_the_background(scail2: Run, tmp_path: Path) -> None:
    dot = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    dot[9, 9] = PALETTE["red"]
    found = findings(scail2, video(tmp_path / "clip.mp4", *[exchanged(square())] * FRAMES))
    assert "covers three sides of the picture or more in frames 0-" in found["exchanged"]["says"]
    words = found["exchanged"]["remedy"].split("`")[1].split()
    assert scail2(*words[1:]).returncode == 0
    assert findings(scail2, tmp_path / "clip_clean.mp4") == {}
    found = findings(scail2, video(tmp_path / "dot.mp4", dot), code=2)
    assert "covers at most 0.016 % of one" in found["no character"]["says"]
    close = square()
    close[10:, :] = PALETTE["red"]  # down to the border below, and at both sides of the lower part
    assert findings(scail2, video(tmp_path / "close.mp4", *[close] * FRAMES)) == {}


def test_a_noisy_reference_must_be_made_again(scail2: Run, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).random((HEIGHT // 2, WIDTH // 2)) < 0.3
    mask = np.where(np.kron(noise, np.ones((2, 2), bool))[..., None], PALETTE["red"], PALETTE["white"])
    found = findings(scail2, image(tmp_path / "ref_mask.png", mask.astype(np.uint8)))
    assert "fragments" in found
    assert "scail2-rt masks make" in found["fragments"]["remedy"]
    assert "masks clean" not in found["fragments"]["remedy"]


def test_the_gap_between_arm_and_body_is_no_hole(scail2: Run, tmp_path: Path) -> None:
    ring = square()
    ring[10:46, 12:22] = 0  # 19 % of the outline
    assert findings(scail2, video(tmp_path / "m.mp4", *[ring] * 3)) == {}


def areas(*changes: tuple[int, int]) -> list[np.ndarray]:
    """Frames of a square whose side changes at given frames."""
    sides = [next(side for first, side in reversed(((0, 44), *changes)) if first <= i) for i in range(FRAMES)]
    return [square(side) for side in sides]


def test_an_area_that_jumps_and_returns(scail2: Run, tmp_path: Path) -> None:
    frames = areas((4, 20), (6, 44))
    case = make_case(tmp_path / "case", driving=frames, ref=blocks("white", "red"))
    says = "jumps in area at frames 4-5, from 31.5 % to 6.5 % of the picture at frame 4"
    for words, end in (
        (["--case", case], ", where the driving clip has no cut."),
        ([case / "rendered_mask_v2.mp4"], "."),
    ):
        found = findings(scail2, *words)
        assert set(found) == {"area jump"}
        assert found["area jump"]["frames"] == [[4, 5]]
        assert found["area jump"]["says"].endswith(says + end)
        assert "masks make" in found["area jump"]["remedy"]


def test_a_lasting_jump_is_distinguished_from_a_cut(scail2: Run, tmp_path: Path) -> None:
    case = make_case(tmp_path / "case", driving=areas((6, 20)), ref=blocks("white", "red"))
    assert findings(scail2, "--case", case)["area jump"]["frames"] == [[6, 6]]
    assert findings(scail2, case / "rendered_mask_v2.mp4") == {}  # without the driving clip it may be a cut
    scenes = [np.full((HEIGHT, WIDTH, 3), colour, np.uint8) for colour in ((200, 190, 180), (20, 60, 120))]
    video(case / "rendered_v2.mp4", *[scenes[i >= 6] for i in range(FRAMES)])
    assert findings(scail2, "--case", case) == {}


def test_entering_and_occlusion_are_no_jumps(scail2: Run, tmp_path: Path) -> None:
    frames = []
    for i in range(FRAMES):  # the red block enters at the left and passes behind the green one
        frame = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        frame[10:54, max(0, 8 * i - 20) : max(1, 8 * i)] = PALETTE["red"]
        frame[4:60, 40:66] = PALETTE["green"]
        frames.append(frame)
    found = findings(scail2, video(tmp_path / "m.mp4", *frames))
    assert not set(found) & set(SHAPES)
