"""Repairing masks: the share of pixels restored, on drawn characters after H.264 and JPEG coding."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.masks.cleaning import Cleaning, clean_frame, connected
from scail2_rt.runtime.masks.palette import CHARACTERS, PALETTE, PALETTE_RGB
from tests.support.mask_damage import coded, figures, misread

PLAIN = Cleaning({})


@pytest.mark.parametrize(
    ("background", "colours", "crf", "at_most"),
    [
        ("black", ("red",), 23, 0.0008),
        ("white", ("red", "green"), 23, 0.0008),
        ("white", CHARACTERS, 23, 0.004),
        ("black", CHARACTERS, 35, 0.008),
    ],
)
def test_coding_damage_is_repaired(
    tmp_path: Path, background: str, colours: tuple[str, ...], crf: int, at_most: float
) -> None:
    true = np.stack([figures(background, *colours, phase=phase / 2) for phase in range(4)])
    damaged = coded(true, tmp_path / "m.mp4", crf)
    clean = np.stack([clean_frame(frame, PLAIN, "m") for frame in damaged])
    assert float((clean != true).any(-1).mean()) < at_most
    assert misread(clean, true) < misread(damaged, true) / 4


def test_jpeg_and_soft_edges_are_repaired() -> None:
    true = figures("black", "red", "blue")
    file = io.BytesIO()
    Image.fromarray(true).save(file, "JPEG", quality=60)
    jpeg = np.asarray(Image.open(file))
    soft = np.asarray(Image.fromarray(true).resize((898, 514), 3).resize((448, 256), 2))
    for damaged in (jpeg, soft):
        clean = clean_frame(damaged, PLAIN, "m")
        assert float((clean != true).any(-1).mean()) < 0.002 < float((damaged != true).any(-1).mean())


@pytest.mark.parametrize("background", ["black", "white"])
def test_a_good_mask_is_unchanged(background: str) -> None:
    true = figures(background, *CHARACTERS)
    assert (clean_frame(true, PLAIN, "m") == true).all()


def test_cleaning_twice_changes_nothing(tmp_path: Path) -> None:
    damaged = coded(figures("white", "red", "cyan")[None], tmp_path / "m.mp4", 30)[0]
    once = clean_frame(damaged, PLAIN, "m")
    assert (clean_frame(once, PLAIN, "m") == once).all()


def test_specks_and_holes_get_the_colour_around_them() -> None:
    true = figures("black", "red")
    spotted = true.copy()
    spotted[20:23, 20:23] = PALETTE["cyan"]  # 9 pixels, a speck
    spotted[128:131, 54:57] = PALETTE["black"]  # a hole in the body
    spotted[200:220, 300:320] = PALETTE["green"]  # 400 pixels, not a speck
    clean = clean_frame(spotted, PLAIN, "m")
    expected = true.copy()
    expected[200:220, 300:320] = PALETTE["green"]
    assert (clean == expected).all()
    assert (clean_frame(spotted, Cleaning({}, speck=0), "m") == spotted).all()
    assert (clean_frame(spotted, Cleaning({}, speck=401), "m") == true).all()


def test_flat_colours_snap_when_they_are_near() -> None:
    true = figures("white", "red", "blue")
    near = true.copy()
    near[(true == PALETTE["red"]).all(-1)] = (190, 20, 30)
    near[(true == PALETTE["white"]).all(-1)] = (200, 205, 210)
    assert (clean_frame(near, PLAIN, "m") == true).all()


def test_flat_grey_becomes_black() -> None:
    grey = figures("black", "red")
    true = grey.copy()
    grey[(true == 0).all(-1)] = 128
    clean = clean_frame(grey, PLAIN, "m")
    assert float((clean != true).any(-1).mean()) < 0.001


def test_another_flat_colour_is_refused_until_it_is_mapped() -> None:
    true = figures("black", "red", "green")
    other = true.copy()
    other[(true == PALETTE["green"]).all(-1)] = (255, 140, 0)
    with pytest.raises(InputError, match=r"\(255,140,0\) covers .* % of ref.png .*--map 255,140,0=COLOUR"):
        clean_frame(other, PLAIN, "ref.png")
    assert (clean_frame(other, Cleaning({(255, 140, 0): "green"}), "ref.png") == true).all()


def test_palette_colours_can_be_swapped_for_others() -> None:
    recoloured = clean_frame(figures("black", "red", "blue"), Cleaning({(255, 0, 0): "green"}), "m")
    assert (recoloured == figures("black", "green", "blue")).all()


def test_the_background_can_be_replaced() -> None:
    assert (clean_frame(figures("black", "red"), Cleaning({}, "white"), "m") == figures("white", "red")).all()
    assert (clean_frame(figures("white", "red"), Cleaning({}, "black"), "m") == figures("black", "red")).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (9, 13)])
def test_connected_areas_agree_with_a_flood_fill(shape: tuple[int, int]) -> None:
    labels = np.random.default_rng(sum(shape)).integers(0, 3, shape).astype(np.uint8)
    expected = np.full(shape, -1)
    areas = 0
    for start in np.ndindex(shape):
        if expected[start] >= 0:
            continue
        stack = [start]
        while stack:
            y, x = stack.pop()
            if not (0 <= y < shape[0] and 0 <= x < shape[1]) or expected[y, x] >= 0 or labels[y, x] != labels[start]:
                continue
            expected[y, x] = areas
            stack += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        areas += 1
    found = connected(labels)
    assert len(set(zip(found.ravel().tolist(), expected.ravel().tolist(), strict=True))) == areas == found.max() + 1


def test_noise_of_any_kind_gives_palette_colours() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    clean = clean_frame(noise, PLAIN, "m").reshape(-1, 3)
    assert {tuple(pixel) for pixel in clean.tolist()} <= {tuple(rgb) for rgb in PALETTE_RGB.tolist()}
