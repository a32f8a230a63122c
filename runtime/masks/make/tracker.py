"""One way to drive the video trackers of SAM 2 and SAM 3: figures are given by a box, points or a mask, and followed
frame by frame.

The models' own session is used without its processor. It keeps every frame and every output; here a frame goes when it
has been followed, and an output when no memory reaches back to it, so a long clip takes as much memory as a short one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from scail2_rt.runtime.masks.make.pixels import Taken, network_mask, network_picture, network_points

if TYPE_CHECKING:
    from torch import Tensor

BOX_CORNERS = (2, 3)  # labels of the points that stand for a box
_WHOLE = ("high_res_masks", "image_embeddings")  # outputs that nothing reads again


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """Where a figure is: points (x, y) [P, 2] in pixels with their labels (1 on the figure, 0 beside it, 2 and 3 the
    corners of a box), or a mask, bool [H, W]."""

    points: np.ndarray | None = None
    labels: tuple[int, ...] = ()
    mask: np.ndarray | None = None

    @classmethod
    def box(cls, corners: np.ndarray | tuple[float, ...]) -> Given:
        """x0, y0, x1, y1."""
        return cls(np.asarray(corners, np.float32).reshape(2, 2), BOX_CORNERS)

    @classmethod
    def point(cls, x: float, y: float) -> Given:
        return cls(np.array([[x, y]], np.float32), (1,))


@dataclass(frozen=True, slots=True, eq=False)
class Followed:
    """A figure in a frame: mask logits [h, w] on the model's device (all negative where it is not seen), and the logit
    of whether it is."""

    logits: Tensor
    seen: float


class Tracker:
    """Figures of one clip, or of one scene of it. model: a `Sam2VideoModel` or `Sam3TrackerVideoModel`; size: (H, W) of
    the frames; vision: features of a prepared picture, for a model that has no encoder of its own."""

    def __init__(
        self,
        model: Any,
        size: tuple[int, int],
        taken: Taken,
        vision: Callable[[Tensor], Mapping[str, Any]] | None = None,
    ) -> None:
        self.size, self.square = size, taken.size[0]
        self._model, self._taken, self._vision = model, taken, vision
        self._session = _session(model, size)
        self._frame = -1

    @property
    def figures(self) -> tuple[int, ...]:
        return tuple(self._session.obj_ids)

    def follow(self, frame: np.ndarray) -> dict[int, Followed]:
        """The next frame, uint8 [H, W, 3] → the figures that are known already."""
        import torch

        self._frame += 1
        with torch.inference_mode():
            picture = network_picture(frame, self._taken).to(self._model.device, self._model.dtype)
            self._session.add_new_frame(picture, self._frame)
            if self._vision is not None:
                self._session.cache.cache_vision_features(self._frame, dict(self._vision(picture)))
            return self._run(picture) if self.figures else {}

    def add(self, figures: Mapping[int, Given], remember: bool = True) -> dict[int, Followed]:
        """New figures in the frame that was followed last, or known ones shown again → all figures in it. Without
        `remember` this is the last frame: no memory is made of it."""
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
        """Whatever no later frame reads."""
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
                    for name in _WHOLE:
                        each.pop(name, None)
            for kept in (outputs["non_cond_frame_outputs"], tracked):
                for frame in [frame for frame in kept if frame < oldest]:
                    del kept[frame]


def _session(model: Any, size: tuple[int, int]) -> Any:
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
