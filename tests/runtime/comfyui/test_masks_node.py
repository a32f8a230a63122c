"""Masks from tracks, mattes and colour-coded images; the text and sheets of the Masks node and the Preview window."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.comfyui.mask_inputs import MaskStyle, mask_frames, parse_figures
from scail2_rt.runtime.masks.make import work
from scail2_rt.runtime.masks.palette import PALETTE
from tests.runtime.comfyui.conftest import Graph, graph_of
from tests.support.comfyui_standins import Host, VideoFromFile
from tests.support.flat_figures import ANN, BEN, FlatSegmenter, flat_folder, picture

pytest_plugins = ["tests.support.runtime_fixtures"]

OPTIONS = {"set_background": True, "colour": "blue", "sort": "left-to-right", "figures": ""}
BLUE, RED, WHITE, BLACK = (PALETTE[name] for name in ("blue", "red", "white", "black"))


def packed(masks: np.ndarray) -> torch.Tensor:
    """bool [T, N, h, w] as ComfyUI packs it: bit i of a byte is the i-th of eight pixels."""
    bits = masks.reshape(*masks.shape[:-1], -1, 8) * (1 << np.arange(8))
    return torch.from_numpy(bits.sum(-1).astype(np.uint8))


@pytest.fixture
def track() -> dict[str, Any]:
    """Two figures in masks of 8x16 for pictures of 16x32: the first one on the right, the second on the left."""
    masks = np.zeros((3, 2, 8, 16), bool)
    masks[:, 0, 2:6, 11:14] = True
    masks[:, 1, 2:6, 3:6] = True
    masks[:, 1, 3, 3] = False
    return {"packed_masks": packed(masks), "orig_size": (16, 32), "n_frames": 3, "scores": [0.9, 0.8]}


def colour_at(frames: Any, x: int, y: int = 9) -> tuple[int, ...]:
    return tuple(frames[1][y, x].tolist())


def test_a_track_gets_the_palette_from_left_to_right(track: dict[str, Any]) -> None:
    frames = mask_frames(track, MaskStyle(), "driving mask")
    assert frames.shape == (3, 16, 32, 3)
    assert [colour_at(frames, x) for x in (8, 24, 16)] == [BLUE, RED, BLACK]
    assert colour_at(frames, 6, 6) == BLACK  # the pixel that the second figure's mask lacks
    assert np.array_equal(np.stack(list(frames)), frames[:])


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        (MaskStyle(sort="none"), [RED, BLUE]),
        (MaskStyle(sort="area"), [RED, BLUE]),
        (MaskStyle(figures=(1,)), [BLACK, BLUE]),
        (MaskStyle(figures=(1, 0)), [RED, BLUE]),
    ],
)
def test_figures_are_sorted_and_chosen(track: dict[str, Any], style: MaskStyle, expected: list[Any]) -> None:
    frames = mask_frames(track, style, "driving mask")
    assert [colour_at(frames, x) for x in (8, 24)] == expected


def test_tracks_that_cannot_be_used_are_refused(track: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="a track without a character"):
        mask_frames({**track, "packed_masks": None}, MaskStyle(), "driving mask")
    for packed_masks in (track["packed_masks"][:0], track["packed_masks"][:, :, :0], "no bits"):
        with pytest.raises(InputError, match="must be uint8"):
            mask_frames({**track, "packed_masks": packed_masks}, MaskStyle(), "driving mask")
    for size in (None, (16,), (0, 32), "wide"):
        with pytest.raises(InputError, match="The orig_size of the driving mask"):
            mask_frames({**track, "orig_size": size}, MaskStyle(), "driving mask")
    with pytest.raises(InputError, match="has 0 to 1"):
        mask_frames(track, MaskStyle(figures=(2,)), "driving mask")
    many = packed(np.ones((1, 7, 8, 16), bool))
    with pytest.raises(InputError, match="7 characters, but there are six colours"):
        mask_frames({**track, "packed_masks": many}, MaskStyle(), "driving mask")
    with pytest.raises(InputError, match="'x' is not a number"):
        parse_figures("0, x")


def test_a_matte_gets_one_colour() -> None:
    matte = torch.zeros(2, 8, 8)
    matte[:, 2:4] = 1
    frames = mask_frames(matte, MaskStyle(background=WHITE, colour="red"), "mask")
    assert tuple(frames[0][2, 0]) == RED
    assert tuple(frames[0][0, 0]) == WHITE


def test_empty_mattes_are_refused() -> None:
    with pytest.raises(InputError, match=r"shape \[0, 8, 8\]\. Connect a MASK"):
        mask_frames(torch.zeros(0, 8, 8), MaskStyle(), "mask")


def test_backgrounds_follow_mode_and_role() -> None:
    assert [style.background for style in MaskStyle.pair("animate")] == [WHITE, BLACK]
    assert [style.background for style in MaskStyle.pair("replace")] == [BLACK, WHITE]


def test_a_coloured_picture_is_repainted_around_its_characters() -> None:
    picture = torch.zeros(1, 4, 4, 3)
    picture[:, 0] = 1
    picture[:, 1] = torch.tensor([0.0, 0.0, 1.0])
    picture[:, 2] = 0.5
    left = mask_frames(picture, MaskStyle(background=WHITE), "mask")[0]
    assert np.array_equal(left, (picture[0] * 255).round().to(torch.uint8).numpy())
    painted = mask_frames(picture, MaskStyle(background=WHITE, repaint=True), "mask")[0]
    assert [tuple(row[0].tolist()) for row in painted] == [WHITE, BLUE, (128, 128, 128), WHITE]


@pytest.fixture
def made(nodes: ModuleType, graph: Graph) -> Callable[..., Any]:
    """Runs the Masks node on the case, with some inputs changed."""
    pictures = {name: graph[name] for name in ("image", "driving", "reference_mask", "driving_mask")}
    return lambda **changes: nodes.MakeMasks.execute(**{"mode": "animate", **pictures, **OPTIONS, **changes})


def test_masks_that_are_right_pass_through(made: Callable[..., Any], graph: Graph, host: Host) -> None:
    reference, driving, text = made().args
    assert np.array_equal(driving[:], graph.arrays["driving_mask"])
    assert np.array_equal(reference[0], graph.arrays["reference_mask"])
    assert "these masks can be used" in text
    assert "framing" not in text  # the frame is not known here
    assert host.texts[-1] == ("7", text)


def test_a_mask_video_is_read_as_it_is_needed(made: Callable[..., Any], graph: Graph, case: Path) -> None:
    driving = made(driving_mask=VideoFromFile(str(case / "rendered_mask_v2.mp4"))).args[1]
    expected = graph.arrays["driving_mask"]
    assert driving.shape == expected.shape
    for part in (slice(0, 8), slice(8, 16), slice(4, 9)):
        assert np.array_equal(driving[part], expected[part])


def test_findings_are_shown_and_not_raised(made: Callable[..., Any], graph: Graph) -> None:
    output = made(driving_mask=graph["driving"])
    assert "these masks cannot be used" in output.args[2]
    sheet = output.ui.image
    assert sheet.ndim == 4
    assert sheet.shape[-1] == 3
    assert sheet.std() > 0.1


def test_the_other_mode_changes_the_backgrounds(made: Callable[..., Any]) -> None:
    reference, driving, _ = made(mode="replace").args
    assert tuple(reference[0][0, 0]) == BLACK
    assert tuple(driving[0][0, 0]) == WHITE


def test_one_mask_for_each_reference(made: Callable[..., Any], graph: Graph) -> None:
    with pytest.raises(InputError, match=r"2 reference image\(s\) and 1 reference mask\(s\)"):
        made(image=torch.cat([graph["image"]] * 2))


def test_the_window_shows_what_the_frame_keeps(nodes: ModuleType, graph: Graph, host: Host) -> None:
    inputs = {name: graph[name] for name in ("image", "driving", "reference_mask", "driving_mask")}
    sheet, text = nodes.PreviewWindow.execute(mode="auto", width=64, height=96, fit="pad", **inputs).args
    assert "whole, with black margins" in text
    assert sheet.shape[0] == 1
    with pytest.raises(InputError, match="Give both"):
        nodes.PreviewWindow.execute(mode="auto", width=64, height=0, fit="pad", **inputs)


def test_a_replace_case(nodes: ModuleType, replace_case: Path) -> None:
    graph = graph_of(replace_case, "replace_mask.mp4")
    pictures = {name: graph[name] for name in ("image", "driving", "reference_mask", "driving_mask")}
    assert "mode replace" in nodes.MakeMasks.execute(mode="replace", **pictures, **OPTIONS).args[2]


class TestMadeInside:
    """Graphs without masks: the segmenter makes them. The test uses one that is exact for flat figures."""

    @pytest.fixture
    def flat(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
        made = FlatSegmenter()
        monkeypatch.setattr(work, "open_segmenter", lambda folder, device: made)
        image, frames = picture({ANN: (5, 5, 30, 55)}), [picture({BEN: (x, 5, x + 30, 55)}) for x in (10, 12, 14)]
        tensors = {"image": image[None], "driving": np.stack(frames)}
        weights = {"segmenter_weights": str(flat_folder(tmp_path / "sam2"))}
        return {**{name: torch.from_numpy(t) / 255 for name, t in tensors.items()}, **OPTIONS, **weights}

    def test_masks_are_made_and_checked(self, nodes: ModuleType, host: Host, flat: dict[str, Any]) -> None:
        reference, driving, text = nodes.MakeMasks.execute(mode="animate", **flat).args
        assert tuple(reference[0][30, 15]) == BLUE
        assert tuple(reference[0][0, 0]) == WHITE
        assert tuple(driving[2][30, 30]) == BLUE
        assert "these masks can be used" in text
        assert any(0 < share < 1 for share, _ in host.progress)

    def test_room_is_made_only_when_the_segmenter_runs(
        self, nodes: ModuleType, flat: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[int] = []
        monkeypatch.setattr("scail2_rt.runtime.comfyui.host.make_room", asked.append)
        first, again = (nodes.MakeMasks.execute(mode="animate", **flat).args for _ in range(2))
        assert len(asked) == 1
        assert asked[0] > 0
        assert np.array_equal(first[1][:], again[1][:])

    def test_one_mask_alone_is_refused(self, nodes: ModuleType, flat: dict[str, Any]) -> None:
        with pytest.raises(InputError, match="Connect both, or none"):
            nodes.MakeMasks.execute(mode="animate", **flat, driving_mask=torch.zeros(3, 4, 4))

    def test_sentences_name_the_nodes_inputs(self, nodes: ModuleType, flat: dict[str, Any]) -> None:
        with pytest.raises(InputError, match=r"^boxes '1,2,3' is not"):
            nodes.MakeMasks.execute(mode="animate", **flat, boxes="1,2,3")

    def test_without_a_segmenter_the_command_that_fetches_one(
        self, nodes: ModuleType, flat: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("SCAIL2_RT_CACHE", str(tmp_path / "empty"))
        with pytest.raises(InputError, match="scail2-rt download --segmenter sam2"):
            nodes.MakeMasks.execute(mode="animate", **{**flat, "segmenter_weights": ""})
