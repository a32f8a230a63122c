"""The rules for making masks, each tested on flat-coloured characters: first those of the official code, then
others."""

import json
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.runtime import Cancelled, Clip, MaskOptions, Masks, Progress, make_masks
from scail2_rt.runtime.masks.make import work
from scail2_rt.runtime.masks.palette import PALETTE
from scail2_rt.runtime.media.clips import open_video
from scail2_rt.runtime.media.images import load_image
from tests.support.flat_figures import (
    ANN,
    BEN,
    CLEO,
    GREY,
    REX,
    FlatSegmenter,
    FlatTracker,
    flat_folder,
    mask_of,
    picture,
)

LEFT, RIGHT, MIDDLE = (5, 5, 30, 55), (65, 5, 95, 55), (38, 10, 60, 50)
Frames = Sequence[np.ndarray]


class Made:
    """The result of `make_masks`, with the pixels of the masks."""

    def __init__(self, masks: Masks, image: np.ndarray, frames: Frames) -> None:
        self.masks, self._image, self._frames = masks, image, frames
        self.reference = load_image(masks.mask_image)
        with open_video(masks.mask_video) as reader:
            self.driving = reader.read(len(frames) + 1)
        assert len(self.driving) == len(frames)

    def reference_colour(self, figure: tuple[int, int, int]) -> str:
        return colour_at(self.reference, mask_of(self._image, figure))

    def driving_colour(self, figure: tuple[int, int, int], frame: int = 0) -> str:
        return colour_at(self.driving[frame], mask_of(self._frames[frame], figure))


def colour_at(pixels: np.ndarray, mask: np.ndarray) -> str:
    """The colour of a frame inside a mask, which must be uniform."""
    found = np.unique(pixels[mask], axis=0)
    assert len(found) == 1
    return next(name for name, rgb in PALETTE.items() if tuple(found[0]) == rgb)


@pytest.fixture
def segmenter(monkeypatch: pytest.MonkeyPatch) -> FlatSegmenter:
    made = FlatSegmenter()
    monkeypatch.setattr(work, "open_segmenter", lambda folder, device: made)
    return made


@pytest.fixture
def make(segmenter: FlatSegmenter, tmp_path: Path) -> Callable[..., Made]:
    def run(image: np.ndarray, pictures: Frames, **options: Any) -> Made:
        folder = flat_folder(tmp_path / "sam2")
        clip = Clip(np.stack(pictures), Fraction(16))
        masks = make_masks(image, clip, tmp_path / "out", MaskOptions(weights=folder, **options), device="cpu")
        return Made(masks, image, pictures)

    return run


def still(figures: dict[Any, Any], count: int = 3) -> list[np.ndarray]:
    return [picture(figures)] * count


def refused(run: Callable[[], object]) -> str:
    with pytest.raises(InputError) as error:
        run()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_left_to_right_in_the_authors_palette(make: Callable[..., Made], segmenter: FlatSegmenter) -> None:
    made = make(picture({ANN: RIGHT, BEN: LEFT}), still({CLEO: LEFT, ANN: RIGHT}))
    assert [made.reference_colour(who) for who in (BEN, ANN)] == ["blue", "red"]
    assert [made.driving_colour(who) for who in (CLEO, ANN)] == ["blue", "red"]
    assert made.masks.characters == ("blue", "red")
    assert set(segmenter.asked) == {"human. character."}
    assert segmenter.closed


def test_the_largest_first(make: Callable[..., Made]) -> None:
    made = make(picture({ANN: (0, 0, 10, 20), BEN: RIGHT}), still({ANN: LEFT}), sort="area")
    assert made.reference_colour(BEN) == "blue"
    assert made.driving_colour(ANN) == "blue"


@pytest.mark.parametrize(
    ("mode", "reference", "driving"), [("animate", "white", "black"), ("replace", "black", "white")]
)
def test_backgrounds_by_mode(make: Callable[..., Made], mode: str, reference: str, driving: str) -> None:
    made = make(picture({ANN: LEFT}), still({BEN: RIGHT}), mode=mode)
    assert made.reference_colour(GREY) == reference
    assert made.driving_colour(GREY) == driving
    assert made.masks.mask_video.name == {"animate": "rendered_mask_v2.mp4", "replace": "replace_mask.mp4"}[mode]


def test_a_character_below_one_percent_of_the_first_frame_is_ignored(make: Callable[..., Made]) -> None:
    """One per cent is 60 of 6,000 pixels."""
    made = make(picture({ANN: LEFT, BEN: (80, 10, 86, 20)}), still({CLEO: RIGHT, BEN: (10, 10, 15, 21)}))
    assert made.reference_colour(BEN) == "white"  # no driving character moves it
    assert any("No character of the driving clip moves character 2" in note for note in made.masks.notes)
    assert made.masks.characters == ("blue",)
    assert made.driving_colour(CLEO) == "blue"
    assert made.driving_colour(BEN) == "black"


def test_fewer_references_than_drivers_take_the_nearest(make: Callable[..., Made]) -> None:
    made = make(picture({ANN: RIGHT}), still({BEN: LEFT, CLEO: (70, 5, 90, 55)}))
    assert made.driving_colour(CLEO) == made.reference_colour(ANN) == "blue"
    assert made.driving_colour(BEN) == "black"
    assert "character 1 of the driving clip" in made.masks.notes[0]


def test_one_to_many_takes_the_driver_that_the_reference_overlaps(make: Callable[..., Made]) -> None:
    """Ann's centre is nearer to Ben's, but she overlaps Cleo more."""
    image = picture({ANN: (20, 20, 80, 40)})
    frames = still({BEN: (48, 2, 52, 56), CLEO: (56, 18, 92, 42)})
    assert make(image, frames).driving_colour(BEN) == "blue"
    made = make(image, frames, one_to_many=True)
    assert made.driving_colour(CLEO) == "blue"
    assert made.driving_colour(BEN) == "black"


def test_pairs_override_the_order(make: Callable[..., Made]) -> None:
    image, frames = picture({ANN: LEFT, BEN: RIGHT}), still({CLEO: LEFT, ANN: RIGHT})
    made = make(image, frames, pairs="1=2,2=1")
    assert made.driving_colour(CLEO) == made.reference_colour(BEN) == "red"
    assert made.driving_colour(ANN) == made.reference_colour(ANN) == "blue"
    assert "has 2" in refused(lambda: make(image, frames, pairs="1=3"))


def test_animals_by_prompt(make: Callable[..., Made]) -> None:
    image, frames = picture({REX: LEFT}), still({REX: RIGHT, ANN: LEFT})
    message = refused(lambda: make(image, frames))
    assert 'No character was found in the reference image with "human. character."' in message
    assert "--mask-prompt" in message
    made = make(image, frames, prompt="dog.")
    assert made.driving_colour(REX) == "blue"
    assert made.driving_colour(ANN) == "black"


def test_max_characters_keeps_the_highest_scores(make: Callable[..., Made]) -> None:
    three = {ANN: LEFT, BEN: MIDDLE, CLEO: RIGHT}
    made = make(picture(three), still(three))
    assert made.masks.characters == ("blue", "red")
    assert made.driving_colour(BEN) == "black"
    made = make(picture(three), still(three), max_characters=3)
    assert [made.driving_colour(who) for who in (ANN, BEN, CLEO)] == ["blue", "red", "green"]
    assert "--max-characters must be 1 to 6" in refused(lambda: make(picture(three), still(three), max_characters=7))


def test_points_and_boxes_with_colours(make: Callable[..., Made], segmenter: FlatSegmenter) -> None:
    """Two points of one colour are one character; without a prompt, text detection does not run."""
    image, frames = picture({ANN: LEFT, BEN: RIGHT}), still({CLEO: LEFT, ANN: RIGHT})
    made = make(
        image,
        frames,
        points=("image:70,20:green", "image:75,40:green", "80,30:green"),
        boxes=("image:5,5,30,55", "5,5,30,55"),
    )
    assert [made.reference_colour(who) for who in (ANN, BEN)] == ["blue", "green"]
    assert [made.driving_colour(who) for who in (CLEO, ANN)] == ["blue", "green"]
    assert segmenter.asked == []


def test_a_point_in_addition_to_text(make: Callable[..., Made]) -> None:
    """The dog is marked, and the human is detected."""
    image, frames = picture({ANN: LEFT, REX: RIGHT}), still({BEN: LEFT, REX: RIGHT})
    made = make(image, frames, prompt="human.", points=("image:80,30:yellow", "80,30:yellow"))
    assert [made.driving_colour(who) for who in (BEN, REX)] == ["blue", "yellow"]


def test_a_late_character_has_a_colour_from_its_first_frame(make: Callable[..., Made]) -> None:
    frames = [picture({BEN: LEFT, **({CLEO: (100 - 5 * (t - 11), 5, 130, 55)} if t > 11 else {})}) for t in range(30)]
    made = make(picture({ANN: LEFT, BEN: RIGHT}), frames)
    assert [made.driving_colour(CLEO, t) for t in (14, 18, 29)] == ["red"] * 3
    assert [made.driving_colour(BEN, t) for t in (0, 14, 29)] == ["blue"] * 3
    assert any("enters late" in note for note in made.masks.notes)


@pytest.mark.parametrize("forgets", [False, True])
def test_a_returning_character_keeps_its_colour(
    make: Callable[..., Made], segmenter: FlatSegmenter, forgets: bool
) -> None:
    """The tracker finds the character again or, if it does not, appearance identifies it."""
    segmenter.forgets = forgets
    there = {True: {BEN: LEFT, CLEO: RIGHT}, False: {BEN: LEFT}}
    frames = [picture(there[t < 6 or t > 20]) for t in range(40)]
    frames[30:] = [picture({CLEO: LEFT, BEN: RIGHT})] * 10  # at the position of the other character
    made = make(picture({ANN: LEFT, CLEO: RIGHT}), frames)
    assert [made.driving_colour(CLEO, t) for t in (0, 26, 39)] == ["red"] * 3
    assert [made.driving_colour(BEN, t) for t in (0, 26, 39)] == ["blue"] * 3
    assert any("was identified as character 2" in note for note in made.masks.notes) == forgets


def test_a_character_that_the_reference_lacks_gets_no_colour(make: Callable[..., Made]) -> None:
    frames = [picture({BEN: LEFT} if t < 10 else {CLEO: RIGHT}) for t in range(25)]
    made = make(picture({ANN: LEFT}), frames)
    assert made.driving_colour(CLEO, 24) == "black"
    assert any("that the reference image lacks enters" in note for note in made.masks.notes)


@pytest.mark.parametrize("text", [True, False])
def test_an_exchange_is_corrected_or_reported(
    make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch, text: bool
) -> None:
    """The tracker exchanges two characters when they meet. The next run of text detection finds this, and corrects the
    frames back to the meeting."""
    frames = [picture({BEN: LEFT, CLEO: RIGHT})] * 20 + [picture({CLEO: LEFT, BEN: RIGHT})] * 20
    honest = FlatTracker.follow

    def confused(self: FlatTracker, frame: np.ndarray) -> Any:
        if (frame == frames[-1]).all() and self.known.get(1) == BEN and not done:
            self.known = {1: CLEO, 2: BEN}
            done.append(self)
        return honest(self, frame)

    done: list[FlatTracker] = []
    monkeypatch.setattr(FlatTracker, "follow", confused)
    monkeypatch.setattr("scail2_rt.runtime.masks.make.cuts.LEVELS", 255)  # so that the meeting is no cut
    points = {} if text else {"points": ("10,30", "80,30")}
    made = make(picture({ANN: LEFT, CLEO: RIGHT}), frames, **points)
    after = "blue" if text else "red"
    assert [made.driving_colour(BEN, t) for t in (0, 19, 20, 23, 24, 39)] == ["blue", "blue", *[after] * 4]
    told = "At frame 24, characters 1, 2 of the driving clip" if text else "From frame 24 on, characters 1 and 2"
    assert len([note for note in made.masks.notes if told in note]) == 1


def test_a_cut_is_found_and_colours_are_kept(make: Callable[..., Made], segmenter: FlatSegmenter) -> None:
    scene = [picture({BEN: LEFT, CLEO: RIGHT})] * 12
    other = [picture({CLEO: LEFT, BEN: RIGHT}, ground=(230, 230, 250))] * 12
    made = make(picture({ANN: LEFT, BEN: RIGHT}), scene + other)
    assert [made.driving_colour(BEN, t) for t in (0, 11, 12, 23)] == ["blue"] * 4
    assert [made.driving_colour(CLEO, t) for t in (0, 11, 12, 23)] == ["red"] * 4
    assert any("The scene changes at frame 12" in note for note in made.masks.notes)


def test_masks_have_hard_edges_at_the_clips_own_size(make: Callable[..., Made]) -> None:
    size = (62, 106)  # not multiples of 4
    image, frames = picture({ANN: LEFT}, (90, 70)), [picture({BEN: (20 + t, 7, 51 + t, 55)}, size) for t in range(5)]
    made = make(image, frames)
    assert made.reference.shape[:2] == (90, 70)
    assert made.driving.shape[1:3] == size
    palette = {tuple(rgb) for rgb in PALETTE.values()}
    assert {tuple(p) for p in made.driving.reshape(-1, 3)} <= palette
    assert all(
        (mask_of(mask, PALETTE["blue"]) == mask_of(frame, BEN)).all()
        for mask, frame in zip(made.driving, frames, strict=True)
    )


def test_a_part_of_the_clip(make: Callable[..., Made]) -> None:
    """The first used frame decides; unused frames show only background, so that frame numbers do not change."""
    frames = [picture({BEN: LEFT})] * 4 + [picture({CLEO: RIGHT})] * 6
    made = make(picture({ANN: LEFT}), frames, start=4, frames=3)
    assert [made.driving_colour(CLEO, t) for t in (4, 6, 7)] == ["blue", "blue", "black"]
    assert made.driving_colour(BEN, 3) == "black"


def test_no_character_in_the_first_frames(make: Callable[..., Made]) -> None:
    frames = [picture({} if t < 10 else {BEN: LEFT}) for t in range(20)]
    made = make(picture({ANN: LEFT}), frames)
    assert made.driving_colour(BEN, 19) == "blue"
    assert "No character was found in the driving clip" in refused(lambda: make(picture({ANN: LEFT}), still({})))


def test_progress_has_seconds_and_cancelling_leaves_no_files(segmenter: FlatSegmenter, tmp_path: Path) -> None:
    told: list[Progress] = []
    cancel = threading.Event()
    clip, image = Clip(np.stack(still({BEN: LEFT}, 20)), Fraction(16)), picture({ANN: LEFT})
    options = MaskOptions(weights=flat_folder(tmp_path / "sam2"))
    make_masks(image, clip, tmp_path / "a", options, device="cpu", on_progress=told.append)
    assert [event.phase for event in told] == ["masks"] * 22
    assert [event.fraction for event in told] == sorted(event.fraction for event in told)
    assert told[-1].fraction == 1
    assert told[5].seconds_left is not None

    def stop(event: Progress) -> None:
        if event.fraction > 0.5:
            cancel.set()

    with pytest.raises(Cancelled):
        make_masks(image, clip, tmp_path / "b", options, device="cpu", on_progress=stop, cancel=cancel)
    assert not (tmp_path / "b").exists()
    assert segmenter.closed


def test_the_same_again_is_taken_as_it_is(segmenter: FlatSegmenter, tmp_path: Path) -> None:
    clip, image = Clip(np.stack(still({BEN: LEFT})), Fraction(16)), picture({ANN: LEFT})
    folder, out = flat_folder(tmp_path / "sam2"), tmp_path / "out"

    def run(**options: Any) -> Masks:
        return make_masks(image, clip, out, MaskOptions(weights=folder, **options), device="cpu")

    first = run()
    assert not first.reused
    again = run()
    assert again.reused
    assert (again.characters, again.mask_image, again.mode) == (first.characters, first.mask_image, first.mode)
    assert not run(mode="replace").reused
    first.mask_image.unlink()
    assert not run(mode="replace").reused


@pytest.mark.parametrize("record", ['{"identity":', {"masks": None}, {"mask_image": 3}, {"colour": "red"}])
def test_a_damaged_record_is_none(segmenter: FlatSegmenter, tmp_path: Path, record: Any) -> None:
    clip, image = Clip(np.stack(still({BEN: LEFT})), Fraction(16)), picture({ANN: LEFT})
    options, file = MaskOptions(weights=flat_folder(tmp_path / "sam2")), tmp_path / "out" / "masks.json"
    make_masks(image, clip, tmp_path / "out", options, device="cpu")
    whole = json.loads(file.read_text())
    file.write_text(record if isinstance(record, str) else json.dumps({**whole, "masks": whole["masks"] | record}))
    if record == {"masks": None}:
        file.write_text(json.dumps({**whole, **record}))
    assert not make_masks(image, clip, tmp_path / "out", options, device="cpu").reused


def test_where_nothing_can_be_written(segmenter: FlatSegmenter, tmp_path: Path) -> None:
    clip, image = Clip(np.stack(still({BEN: LEFT})), Fraction(16)), picture({ANN: LEFT})
    options = MaskOptions(weights=flat_folder(tmp_path / "sam2"))
    (tmp_path / "out").touch()
    with pytest.raises(Scail2Error, match="Masks could not be written to"):
        make_masks(image, clip, tmp_path / "out", options, device="cpu")
