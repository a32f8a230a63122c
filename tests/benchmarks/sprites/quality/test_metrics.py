"""The quality metrics: identities, closed forms, and the differences that each must and must not detect."""

import math

import numpy as np
import pytest

from scail2_rt.benchmarks.sprites.quality import metrics

RANDOM = np.random.default_rng(0)


def texture(frames: int = 4, size: int = 64) -> np.ndarray:
    """Moving stripes and noise: no two places look the same. uint8 [T, H, W, 3]."""
    field = RANDOM.uniform(0, 255, (size // 4, size // 4, 3))
    still = np.kron(field, np.ones((4, 4, 1)))
    return np.stack([np.roll(still, 2 * t, axis=1) for t in range(frames)]).astype(np.uint8)


def test_psnr_is_that_of_the_squared_error() -> None:
    truth = np.full((2, 8, 8, 3), 100, np.uint8)
    assert metrics.psnr(truth, truth) == metrics.MOST_DB
    assert metrics.psnr(truth + 5, truth) == pytest.approx(20 * math.log10(255 / 5), abs=1e-4)
    half = truth.copy()
    half[:, :4] += 10
    region = np.zeros((2, 8, 8), bool)
    region[:, :4] = True
    assert metrics.psnr(half, truth, region) == pytest.approx(20 * math.log10(255 / 10), abs=1e-4)
    assert metrics.psnr(half, truth, ~region) == metrics.MOST_DB
    assert math.isnan(metrics.psnr(half, truth, np.zeros_like(region)))
    half[1] = truth[1]
    assert metrics.frame_psnr(half, truth, region) == pytest.approx([20 * math.log10(25.5), metrics.MOST_DB], abs=1e-4)


def test_ssim_of_flat_and_equal_pictures() -> None:
    truth = texture()
    assert metrics.ssim(truth, truth) == pytest.approx(1, abs=1e-9)
    dark, light = (np.full((1, 16, 16, 3), level, np.uint8) for level in (60, 180))
    expected = (2 * 60 * 180 + metrics.SSIM_C1) / (60**2 + 180**2 + metrics.SSIM_C1)  # no variance: means alone
    assert metrics.ssim(light, dark) == pytest.approx(expected, abs=1e-6)


def test_ssim_agrees_with_its_formula_written_out() -> None:
    x, y = (RANDOM.integers(0, 256, (1, 13, 12, 3)).astype(np.uint8) for _ in range(2))
    axis = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = np.outer(axis, axis) / axis.sum() ** 2
    values = []
    for c in range(3):
        for top in range(3):
            for left in range(2):
                a, b = (v[0, top : top + 11, left : left + 11, c].astype(float) for v in (x, y))
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
                cov = (window * (a - mean_a) * (b - mean_b)).sum()
                c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                top_part = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
                values.append(top_part / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    assert metrics.ssim(x, y) == pytest.approx(np.mean(values), abs=1e-9)


@pytest.mark.parametrize(
    ("rgb", "expected"),
    [
        ((255, 255, 255), (100.0, 0.0, 0.0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((10, 10, 10), (2.74, 0.0, 0.0)),
    ],
)
def test_lab_of_known_colours(rgb: tuple[int, int, int], expected: tuple[float, float, float]) -> None:
    assert metrics.lab(np.array(rgb, np.uint8)) == pytest.approx(expected, abs=0.05)


def test_colour_and_shape_errors() -> None:
    scene = np.full((2, 32, 32, 3), 90, np.uint8)
    truth = scene.copy()
    truth[:, 8:24, 8:16] = (255, 0, 0)
    output = scene.copy()
    output[:, 8:24, 12:20] = (255, 0, 0)
    shapes = [metrics.silhouette(video, scene) for video in (output, truth)]
    assert shapes[1].sum() == 2 * 16 * 8
    assert metrics.shape_error(*shapes) == pytest.approx(1 - 4 / 12)
    assert metrics.shape_error(shapes[1], shapes[1]) == 0
    assert metrics.colour_error(truth, truth, shapes[1]) == 0
    blue = truth.copy()
    blue[shapes[1]] = (0, 0, 255)
    apart = math.dist((53.24, 80.09, 67.20), (32.30, 79.19, -107.86))
    assert metrics.colour_error(blue, truth, shapes[1]) == pytest.approx(apart, abs=0.1)
    blue[1] = truth[1]
    assert metrics.frame_colour(blue, truth, shapes[1]) == pytest.approx([apart, 0], abs=0.1)


def test_motion_error_is_the_distance_of_the_content() -> None:
    truth = texture()
    joints = np.tile(np.array([[20.0, 24.0], [40.0, 33.0], [30.4, 45.0]]), (len(truth), 1, 1))
    assert metrics.motion_error(truth, truth, joints) == 0
    moved = np.roll(truth, (4, 3), axis=(1, 2))
    assert metrics.motion_error(moved, truth, joints) == pytest.approx(5)
    lighter = (truth // 2 + 60).astype(np.uint8)  # another exposure is no motion
    assert metrics.motion_error(lighter, truth, joints) < 0.5
    noisy = np.clip(truth + RANDOM.normal(0, 10, truth.shape), 0, 255).astype(np.uint8)
    assert metrics.motion_error(noisy, truth, joints) == 0


def test_blank_and_garbled_videos_do_not_pass_for_motion() -> None:
    truth = texture()
    joints = np.full((len(truth), 1, 2), 30.0)
    garbled = RANDOM.integers(0, 256, truth.shape).astype(np.uint8)
    for output in (np.full_like(truth, 128), garbled):
        assert metrics.motion_error(output, truth, joints) == metrics.SEARCH


def test_joints_whose_place_cannot_be_told_are_left_out() -> None:
    truth = texture()
    truth[:, 8:56, :30] = 128  # flat
    truth[:, 8:56, 34:] = np.where(np.arange(8, 56) % 8 < 4, 40, 200)[None, :, None, None]  # the same every 8 rows
    flat, repeated, outside = [14.0, 32.0], [50.0, 32.0], [90.0, 10.0]
    for joint in (flat, repeated, outside):
        assert math.isnan(metrics.motion_error(truth, truth, np.tile(joint, (len(truth), 1, 1))))
    edge = [32.0, 32.0]
    both = np.tile(np.array([flat, [32.0, 6.0]]), (len(truth), 1, 1))
    assert metrics.motion_error(truth, truth, both) == 0
    assert metrics.motion_error(np.roll(truth, 2, 1), truth, np.tile(edge, (len(truth), 1, 1))) == pytest.approx(2)


def test_seam_error_sees_a_jump_that_the_truth_does_not_make() -> None:
    truth = np.tile(np.arange(10, dtype=np.uint8)[:, None, None, None], (1, 8, 8, 3)) * 3
    assert metrics.seam_error(truth, truth, (5,)) == (0, 0)
    assert metrics.seam_error(truth + 20, truth, (5,)) == (0, 0)  # an offset is no seam
    jump = truth.copy()
    jump[5:] += 8
    assert metrics.seam_error(jump, truth, (5,)) == (8, 0)
    assert metrics.seam_error(jump, truth, (3,)) == (0, 1)
