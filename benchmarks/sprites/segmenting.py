"""The small trained SAM 2 that comes with the package, a detector of drawn figures, and masks for sprite cases.

The detector prompts the segmenter with the points of a grid, one after another. The segmenter was also trained on
background points, for which it predicts that no figure is present. Masks on which several points agree are kept.
"""

from pathlib import Path

import numpy as np

from scail2_rt.benchmarks.sprites.world.cases import SpriteCase
from scail2_rt.kernels.errors import InputError
from scail2_rt.kernels.wording import counted
from scail2_rt.runtime.core.progress import Listener
from scail2_rt.runtime.masks.make.figures import LEAST_AREA, area, box_iou, iou
from scail2_rt.runtime.masks.make.folders import open_folder
from scail2_rt.runtime.masks.make.follow import masks_of
from scail2_rt.runtime.masks.make.make import Masks, make_masks
from scail2_rt.runtime.masks.make.options import MaskOptions
from scail2_rt.runtime.masks.make.segmenters import Segmenter, open_segmenter
from scail2_rt.runtime.masks.make.tracker import Given
from scail2_rt.runtime.masks.palette import CHARACTERS, PALETTE
from scail2_rt.runtime.media.clips import open_video

SEGMENTER = Path(__file__).parent / "segmenter"
GRID = 9  # grid points per side
ALIKE = 0.6  # minimum IoU of two masks of the same figure
AGREED = 2  # minimum number of points that agree on a figure
Box = tuple[int, int, int, int]


def shipped_segmenter() -> Path:
    """The folder of the segmenter. Raises InputError if it is missing."""
    if not (SEGMENTER / "model.safetensors").is_file():
        raise InputError(
            f"The sprite segmenter is missing at {SEGMENTER}. Get it from the repository, or train it with "
            "`python -m scail2_rt.benchmarks.sprites.training.train_segmenter`."
        )
    return SEGMENTER


def figure_masks(picture: np.ndarray, segmenter: Segmenter) -> list[np.ndarray]:
    """Masks bool [H, W] of the drawn figures in a picture uint8 [H, W, 3], sorted by the number of agreeing points."""
    height, width = picture.shape[:2]
    points = [
        Given.point((x + 0.5) * width / GRID, (y + 0.5) * height / GRID) for y in range(GRID) for x in range(GRID)
    ]
    tracker = segmenter.tracker((height, width))
    tracker.follow(picture)
    followed = {n: each for n, each in tracker.add(dict(enumerate(points)), remember=False).items() if each.seen > 0}
    masks = masks_of(followed, (height, width))
    surest = sorted((n for n in masks if area(masks[n]) >= LEAST_AREA), key=lambda n: -followed[n].seen)
    groups: list[list[np.ndarray]] = []
    for number in surest:
        same = next((group for group in groups if iou(group[0], masks[number]) >= ALIKE), None)
        groups.append([masks[number]]) if same is None else same.append(masks[number])
    groups.sort(key=lambda group: -len(group))
    return [group[0] for group in groups if len(group) >= AGREED]


def box_of(mask: np.ndarray) -> Box:
    """The bounding box x0, y0, x1, y1 of a non-empty mask, in pixels; x1 and y1 are exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def found_boxes(picture: np.ndarray, segmenter: Segmenter, count: int = 1) -> list[Box]:
    """Boxes of the `count` figures with most agreeing points. Raises InputError if fewer are found."""
    masks = figure_masks(picture, segmenter)
    if len(masks) < count:
        raise InputError(
            f"The detector of drawn figures found {len(masks)} of {counted(count, 'figure')}. Use another picture."
        )
    return [box_of(mask) for mask in masks[:count]]


def case_boxes(case: SpriteCase, segmenter: Segmenter) -> tuple[str, ...]:
    """`--box` values for a case: the boxes that the detector finds in the reference image and the first driving frame.
    Their colours are those of the true masks, which define which figure drives which character."""
    found: list[str] = []
    for where, picture, mask in (
        ("image:", case.reference, case.reference_mask),
        ("", case.driving[0], case.driving_mask[0]),
    ):
        figures = {name: (mask == PALETTE[name]).all(-1) for name in CHARACTERS}
        figures = {name: there for name, there in figures.items() if there.any()}
        boxes = found_boxes(picture, segmenter, len(figures))
        for name, there in figures.items():
            nearest = max(boxes, key=lambda box: box_iou(box, box_of(there)))
            found.append(f"{where}{','.join(map(str, nearest))}:{name}")
    return tuple(found)


def case_masks(
    case: SpriteCase, image: Path, driving: Path, directory: Path, listener: Listener | None = None
) -> Masks:
    """Make masks for a drawn case in `directory`, with the small SAM 2 and the boxes of the detector."""
    folder = shipped_segmenter()
    segmenter = open_segmenter(open_folder(folder), "cpu")
    boxes = case_boxes(case, segmenter)
    segmenter.close()
    options = MaskOptions(
        mode="replace" if case.scene.mode == "replace" else "animate", weights=folder, boxes=boxes, max_characters=3
    )
    return make_masks(image, driving, directory, options, device="cpu", on_progress=listener)


def replace_masks(case: SpriteCase, folder: Path, listener: Listener | None = None) -> tuple[Masks, dict[str, float]]:
    """Make the masks of a case that `write_case` wrote to `folder`, replacing the true ones. Returns (masks,
    `mask_scores`)."""
    masks = case_masks(case, folder / "ref.png", folder / "rendered_v2.mp4", folder, listener)
    with open_video(masks.mask_video) as reader:
        return masks, mask_scores(reader.read(len(case.driving)), case.driving_mask)


def mask_scores(made: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Compare mask frames with the true ones, both uint8 [T, H, W, 3]. mask_iou: mean IoU over characters and the
    frames that show them; exchanged: share of these in which a colour covers more of another character."""
    figures = {name: (true == PALETTE[name]).all(-1) for name in CHARACTERS}
    overlaps: list[float] = []
    exchanged: list[bool] = []
    for name, there in figures.items():
        ours = (made == PALETTE[name]).all(-1)
        others = [other for rival, other in figures.items() if rival != name]
        for frame in np.flatnonzero(there.any((1, 2))):
            overlaps.append(iou(ours[frame], there[frame]))
            own = int((ours[frame] & there[frame]).sum())
            exchanged.append(any(int((ours[frame] & other[frame]).sum()) > own for other in others))
    return {"mask_iou": float(np.mean(overlaps)), "exchanged": float(np.mean(exchanged))}
