"""Discontinuous audio timestamps: gaps, overlaps, tracks that restart."""

import numpy as np

from scail2_rt.runtime.media.audio import _blocks, _Timeline


def laid_out(*pieces: tuple[int, list[float]]) -> tuple[int, list[float]]:
    """(first position, samples) after `_blocks` with a tolerance of 2 samples."""
    blocks = list(_blocks(((position, np.array([samples])) for position, samples in pieces), 2, 1024))
    return blocks[0][0], np.concatenate([samples for _, samples in blocks], axis=1)[0].tolist()


def test_small_differences_are_rounding() -> None:
    assert laid_out((5, [1, 2, 3]), (10, [4, 5])) == (5, [1, 2, 3, 4, 5])
    assert laid_out((5, [1, 2, 3]), (6, [4, 5])) == (5, [1, 2, 3, 4, 5])


def test_a_gap_is_silence() -> None:
    assert laid_out((0, [1, 2]), (5, [3])) == (0, [1, 2, 0, 0, 0, 3])


def test_small_gaps_that_add_up_are_filled() -> None:
    assert laid_out((0, [1, 2]), (4, [3, 4]), (8, [5])) == (0, [1, 2, 3, 4, 0, 0, 0, 0, 5])


def test_an_overlap_is_cut() -> None:
    assert laid_out((0, [1, 2, 3, 4]), (1, [5, 6, 7, 8])) == (0, [1, 2, 3, 4, 8])


def test_a_track_that_restarts_is_continued() -> None:
    timeline = _Timeline(rate=100)
    assert [timeline.place(position, 50) for position in (200, 250, 245, 10, 60)] == [200, 250, 245, 295, 345]
