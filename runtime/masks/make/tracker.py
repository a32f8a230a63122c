"""One interface to the video trackers of SAM 2 and SAM 3: characters are marked by a box, points or a mask, and tracked
frame by frame.

The models' sessions are used without their processor. A session keeps all frames and outputs; this module removes a
frame after it is tracked, and an output when no later frame reads it, so memory does not grow with the length of the
clip.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from scail2_rt.runtime.masks.make.pixels import InputFormat, network_mask, network_picture, network_points

if TYPE_CHECKING:
    from torch import Tensor

BOX_CORNERS = (2, 3)  # labels of points that are corners of a box
_UNUSED = ("high_res_masks", "image_embeddings")  # outputs that no later frame reads


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """The prompt that marks a character in a frame.

    points   (x, y) in pixels, [P, 2]
    labels   of the points: 1 on the character, 0 beside it, 2 and 3 corners of a box
    mask     bool [H, W], instead of points"""

    points: np.ndarray | None = None
    labels: tuple[int, ...] = ()
    mask: np.ndarray | None = None

    @classmethod
    def box(cls, corners: np.ndarray | tuple[float, ...]) -> Given:
        """A box x0, y0, x1, y1 in pixels."""
        return cls(np.asarray(corners, np.float32).reshape(2, 2), BOX_CORNERS)

    @classmethod
    def point(cls, x: float, y: float) -> Given:
        """A point on the character, in pixels."""
        return cls(np.array([[x, y]], np.float32), (1,))


@dataclass(frozen=True, slots=True, eq=False)
class Followed:
    """A tracked character in a frame.

    logits   mask logits [h, w] on the model's device; all negative if the character is not visible
    seen     logit of its visibility"""

    logits: Tensor
    seen: float


class Tracker:
    """Tracks the characters of one clip or scene.

    model    a `Sam2VideoModel` or `Sam3TrackerVideoModel`
    size     (H, W) of the frames
    form     input format of the model
    vision   computes the features of an input, for a model without an encoder"""

    def __init__(
        self,
        model: Any,
        size: tuple[int, int],
        form: InputFormat,
        vision: Callable[[Tensor], Mapping[str, Any]] | None = None,
    ) -> None:
        self.size, self.square = size, form.size[0]
        self._model, self._format, self._vision = model, form, vision
        self._session = _session(model, size)
        self._frame = -1

    @property
    def figures(self) -> tuple[int, ...]:
        """Numbers of the tracked characters."""
        return tuple(self._session.obj_ids)

    def follow(self, frame: np.ndarray) -> dict[int, Followed]:
        """Track the known characters in the next frame, uint8 [H, W, 3]."""
        import torch

        self._frame += 1
        with torch.inference_mode():
            picture = network_picture(frame, self._format).to(self._model.device, self._model.dtype)
            self._session.add_new_frame(picture, self._frame)
            if self._vision is not None:
                self._session.cache.cache_vision_features(self._frame, dict(self._vision(picture)))
            return self._run(picture) if self.figures else {}

    def add(self, figures: Mapping[int, Given], remember: bool = True) -> dict[int, Followed]:
        """Add new characters, or correct known ones, in the last frame given to `follow`. Returns all characters in it.
        Without `remember` no memory of the frame is kept, so no frame can follow."""
        import torch

        session = self._session
        with torch.inference_mode():
            for figure, given in figures.items():
                index = session.obj_id_to_idx(figure)
                if given.mask is not None:
                    session.add_mask_inputs(index, self._frame, network_mask(given.mask, self.square))
                elif given.points is not None:
                    points = network_points(given.points, self.size, self.square)
                    labels = torch.tensor(given.labels, dtype=torch.int32)[None, None]
                    session.add_point_inputs(index, self._frame, {"point_coords": points, "point_labels": labels})
                session.frames_tracked_per_obj[index].pop(self._frame, None)
            session.obj_with_new_inputs = list(figures)
            return self._run(session.get_frame(self._frame), remember)

    def _run(self, picture: Tensor, remember: bool = True) -> dict[int, Followed]:
        out = self._model(self._session, frame=picture, frame_idx=self._frame, run_mem_encoder=remember)
        self._forget()
        return {
            figure: Followed(mask, float(seen))
            for figure, mask, seen in zip(
                out.object_ids, out.pred_masks[:, 0], out.object_score_logits.flatten().tolist(), strict=True
            )
        }

    def _forget(self) -> None:
        """Remove frames and outputs that no later frame reads."""
        config = self._model.config
        oldest = self._frame - max(config.num_maskmem, config.max_object_pointers_in_encoder)
        session = self._session
        for frame in [frame for frame in session.processed_frames if frame < self._frame]:
            del session.processed_frames[frame]
        for outputs, tracked in zip(
            session.output_dict_per_obj.values(), session.frames_tracked_per_obj.values(), strict=True
        ):
            for kind in outputs.values():
                for each in kind.values():
                    for name in _UNUSED:
                        each.pop(name, None)
            for kept in (outputs["non_cond_frame_outputs"], tracked):
                for frame in [frame for frame in kept if frame < oldest]:
                    del kept[frame]


def _session(model: Any, size: tuple[int, int]) -> Any:
    """An inference session of the class that belongs to the model."""
    import importlib

    module = importlib.import_module(type(model).__module__)
    name = type(model).__name__.replace("Model", "InferenceSession")
    return getattr(module, name)(
        video_height=size[0],
        video_width=size[1],
        inference_device=model.device,
        inference_state_device=model.device,
        video_storage_device=model.device,
        dtype=model.dtype,
    )
