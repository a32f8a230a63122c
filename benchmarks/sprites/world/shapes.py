"""Cases whose inputs have other aspect ratios than the video's frame, for measuring the loss by the official crop.

A scene of `cases` is drawn with a different shape for the frame and for each input. All pictures are as high as the
frame (128 units), so a figure has the same size in the input and in the correct output, and its position in the frame
is the one that `--fit auto` should choose. The equal case is the same scene with both inputs in the frame's shape.

    portrait   animate: a portrait driving clip; the reference image and the frame are landscape
    landscape  animate: a landscape driving clip with its figure at the left edge; reference and frame are portrait
    edge       replace: a landscape driving clip with its figure at the left edge; frame landscape, reference portrait
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from scail2_rt.benchmarks.sprites.world.cases import Scene, SpriteCase, View, draw_view
from scail2_rt.benchmarks.sprites.world.figures import AX, BX
from scail2_rt.benchmarks.sprites.world.raster import PAN, UNITS, Picture, draw_picture

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Shapes:
    """(H, W) in pixels of the frame and of the inputs. The model was trained only on frames 128 pixels high.

    left: mean x of the driving figures in units from the frame's left edge; None: unchanged"""

    frame: Size
    reference: Size
    driving: Size
    left: float | None = None

    @property
    def equal(self) -> "Shapes":
        """The same with both inputs in the frame's shape."""
        return replace(self, reference=self.frame, driving=self.frame)


SHAPES: Mapping[str, Shapes] = {
    "portrait": Shapes((128, 192), (128, 192), (160, 128)),
    "landscape": Shapes((128, 96), (128, 96), (128, 192), left=38),
    "edge": Shapes((128, 192), (160, 128), (128, 192), left=34),
}


def units_wide(size: Size) -> float:
    """The width in units of a picture of `size` (H, W) that is 128 units high."""
    return UNITS * size[1] / size[0]


def moved(picture: Picture, figures: float, scenery: float) -> Picture:
    """The picture with its figures moved right by `figures` units and its background by `scenery` units."""
    parts, background = picture.parts.copy(), picture.background.copy()
    parts[..., [AX, BX]] += figures
    background[:, PAN] += scenery
    return Picture(parts, background)


def render_shapes(task: str, scene: Scene, shapes: Shapes) -> SpriteCase:
    """Draw a scene, which is made for a square frame, as a case with these shapes."""
    middle = units_wide(shapes.frame) / 2 - UNITS / 2
    place = middle if shapes.left is None else shapes.left - float(scene.joints[..., 0].mean())
    wide = units_wide(shapes.driving)
    # a clip narrower than the frame is centred in it; of a wider clip the frame shows the left end
    driving = (wide - units_wide(shapes.frame)) / 2 if wide < units_wide(shapes.frame) else 0.0
    reference = units_wide(shapes.reference) / 2 - UNITS / 2
    scene = replace(
        scene,
        task=task,
        reference=_moved_view(scene.reference, reference, reference),
        driving=_moved_view(scene.driving, place + driving, middle + driving),
        truth=moved(scene.truth, place, middle),
        joints=scene.joints + np.array([place, 0.0]),
    )
    image, _, mask = draw_view(scene.reference, shapes.reference)
    clip, _, clip_mask = draw_view(scene.driving, shapes.driving)
    truth, labels = draw_picture(scene.truth, *shapes.frame)
    return SpriteCase(scene, image[0], mask[0], (), clip, clip_mask, truth, labels, np.zeros(labels.shape, bool))


def _moved_view(view: View, figures: float, scenery: float) -> View:
    return replace(view, picture=moved(view.picture, figures, scenery))
