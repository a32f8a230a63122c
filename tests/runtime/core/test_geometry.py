"""Sizes, segments, token layout and FLOP counts. Segments are also compared with the golden plans."""

import json
from itertools import product
from pathlib import Path

import pytest

from scail2_rt.export.models.config import DiTConfig
from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.kernels.rope import multipliers
from scail2_rt.runtime.core.geometry import (
    Layout,
    check_size,
    forward_flops,
    latent_frames,
    oriented,
    padded_length,
    plan_segments,
    vae_decode_flops,
    vae_encode_flops,
)

FOURTEEN_B = DiTConfig(dim=5120, heads=40, layers=40, ffn_dim=13824)


def test_plans_equal_the_golden_ones(golden: Path) -> None:
    table = json.loads((golden / "segments" / "segments.json").read_text())
    for row in table["rows"]:
        arguments = row["total_frames"], row["segment_len"], row["overlap"]
        if "plan" not in row:
            with pytest.raises(InputError):
                plan_segments(*arguments)
            continue
        plan = plan_segments(*arguments)
        assert [[getattr(segment, name) for name in table["plan_columns"]] for segment in plan] == row["plan"]


@pytest.mark.parametrize(
    ("length", "overlap"), [(5, 1), (9, 1), (9, 5), (13, 9), (33, 29), (49, 13), (81, 5), (81, 77)]
)
def test_every_frame_is_produced_once(length: int, overlap: int) -> None:
    for total in range(1, 3 * length + 2):
        produced: list[int] = []
        plan = plan_segments(total, length, overlap)
        for index, segment in enumerate(plan):
            assert segment.overlap == (overlap if index else 0)
            assert segment.start == len(produced) - segment.overlap, "a segment starts where its history starts"
            assert segment.padded_frames % 4 == 1
            assert segment.padded_frames <= length
            assert 0 <= segment.padding < 4
            assert segment.new_frames > 0
            assert segment.valid_frames == length or index == len(plan) - 1, "only the last segment is short"
            assert segment.latent_frames > segment.history_latents, "there is something left to generate"
            produced += range(segment.start, segment.valid_end)[segment.overlap :]
            assert len(range(segment.start, segment.valid_end)[segment.overlap :]) == segment.new_frames
        assert produced == list(range(total))


def test_history_counts_latent_frames() -> None:
    first, second = plan_segments(100, 81, 9)
    assert (first.history_latents, second.history_latents) == (0, 3)
    assert (first.latent_frames, second.latent_frames) == (21, 8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 81, 5), "at least one"),
        ((-3, 81, 5), "-3 driving frames"),
        ((10, 80, 5), "not 80: use 77 or 81."),
        ((10, 83, 5), "use 81 or 85."),
        ((10, 1, 1), "use 5."),
        ((10, 0, 5), "use 5."),
        ((10, -8, 5), "use 5."),
        ((10, 81, 0), "use 1."),
        ((10, 81, -4), "use 1."),
        ((10, 81, 81), "use 77."),
        ((10, 81, 200), "use 77."),
        ((10, 81, 6), "use 5 or 9."),
        ((10, 9, 8), "use 5."),
    ],
)
def test_bad_segments_are_refused_with_valid_values(arguments: tuple[int, int, int], words: str) -> None:
    with pytest.raises(InputError) as error:
        plan_segments(*arguments)
    message = str(error.value)
    assert words in message
    _, _, offers = message.rpartition("use ")
    for offer in offers.rstrip(".").split(" or ") if "use " in message else []:
        length, overlap = (int(offer), 1) if "length must" in message else (arguments[1], int(offer))
        assert plan_segments(10, length, overlap), "what is offered is accepted"


def test_pixel_and_latent_lengths() -> None:
    assert [padded_length(frames) for frames in (1, 2, 5, 6, 80, 81, 82)] == [1, 5, 5, 9, 81, 81, 85]
    assert [latent_frames(frames) for frames in (1, 5, 81)] == [1, 2, 21]
    with pytest.raises(Scail2Error, match="pad it to 81"):
        latent_frames(80)


@pytest.mark.parametrize(
    ("size", "image", "expected"),
    [
        ((512, 896), (1080, 1920), (512, 896)),
        ((512, 896), (1920, 1080), (896, 512)),
        ((896, 512), (1080, 1920), (512, 896)),
        ((896, 512), (1920, 1080), (896, 512)),
        ((512, 896), (700, 700), (512, 896)),
        ((896, 512), (700, 700), (896, 512)),
        ((512, 512), (1920, 1080), (512, 512)),
    ],
)
def test_orientation(size: tuple[int, int], image: tuple[int, int], expected: tuple[int, int]) -> None:
    assert oriented(size, *image) == expected


def test_sizes() -> None:
    for height, width in ((32, 32), (64, 96), (512, 896), (704, 1280)):
        check_size(height, width)
    for height, width in ((500, 900), (512, 900), (16, 64), (0, 0), (-32, 64), (33, 31)):
        with pytest.raises(InputError) as error:
            check_size(height, width)
        offers = str(error.value).partition("use ")[2].rstrip(".").split(" or ")
        for offer in offers:
            check_size(*map(int, offer.split("x")))
    with pytest.raises(InputError, match="use 512x896 or 480x896"):
        check_size(500, 900)


def test_tokens_of_the_trained_sizes() -> None:
    small = Layout.of(81, 512, 896)
    assert (small.frames, small.height, small.width, small.grid) == (21, 64, 112, (32, 56))
    assert (small.reference_tokens, small.video_tokens, small.driving_tokens) == (1792, 37632, 9408)
    assert small.tokens == 48832
    large = Layout.of(81, 704, 1280)
    assert (large.reference_tokens, large.video_tokens, large.driving_tokens) == (3520, 73920, 18480)
    assert large.tokens == 95920
    assert Layout.of(81, 512, 896, additional_refs=2).tokens == 48832 + 2 * 1792


def test_layout_covers_the_sequence_in_order() -> None:
    for frames, height, width, refs, replace in product((1, 3), (4, 8), (4, 12), (0, 1, 2), (False, True)):
        layout = Layout(frames, height, width, refs, replace)
        rows = list(range(layout.tokens))
        assert rows[layout.references] + rows[layout.video] + rows[layout.driving] == rows
        assert len(rows[layout.references]) == layout.reference_tokens == (refs + 1) * layout.frame_tokens
        assert len(rows[layout.video]) == 4 * layout.driving_tokens
        table = multipliers(frames, *layout.grid, 12, refs, replace)
        assert len(table) == layout.tokens
        modulus = table.abs().amin(dim=1)
        assert (modulus[: layout.driving.start] > 1 - 1e-12).all()
        assert (modulus[layout.driving] < 1 - 1e-3).all(), "only driving multipliers are averaged"


def test_impossible_layouts() -> None:
    with pytest.raises(InputError, match="divisible by 32"):
        Layout.of(81, 500, 896)
    with pytest.raises(Scail2Error, match="no latent form"):
        Layout.of(80, 512, 896)
    for arguments in ((0, 8, 8), (1, 6, 8), (1, 8, 2), (1, 8, 8, -1)):
        with pytest.raises(Scail2Error):
            Layout(*arguments)


def test_transformer_flops() -> None:
    small, large = Layout.of(81, 512, 896), Layout.of(81, 704, 1280)
    assert f"{forward_flops(FOURTEEN_B, small):.2e}" == "3.16e+15"
    assert f"{forward_flops(FOURTEEN_B, large):.1e}" == "9.9e+15"
    with_references = forward_flops(FOURTEEN_B, Layout.of(81, 512, 896, additional_refs=2))
    assert forward_flops(FOURTEEN_B, small) < with_references < forward_flops(FOURTEEN_B, large)


def test_vae_flops() -> None:
    assert vae_encode_flops(1, 512, 896) == pytest.approx(3.1e12)
    assert vae_encode_flops(5, 512, 896) == pytest.approx(12.4e12)
    assert vae_encode_flops(81, 256, 448) == pytest.approx(47e12, rel=0.01)
    assert vae_decode_flops(81, 512, 896) == pytest.approx(317e12)
    assert vae_decode_flops(81, 1024, 896) == pytest.approx(634e12)
