"""Segmenters: what finds figures by text, and what follows them. SAM 2 with Grounding DINO, or SAM 3.

Both are the classes of `transformers`, opened from a folder. A `Segmenter` finds figures in one picture, as boxes or as
masks, and makes trackers; the rules about characters and colours are no business of its.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.masks.make.figures import box_iou, iou
from scail2_rt.runtime.masks.make.pixels import HALF, MEAN, STD, Taken, network_picture, picture_masks
from scail2_rt.runtime.masks.make.tracker import Given, Tracker

if TYPE_CHECKING:
    from torch import Tensor

    from scail2_rt.runtime.masks.make.folders import SegmenterFolder

CONFIDENCE = 0.25  # the authors', of SAM 3; Grounding DINO's usual one too
SHORT_SIDE, LONG_SIDE = 800, 1333  # of pictures for Grounding DINO
SAM3_TOKENS = 32
SAME_BOX, SAME_MASK = 0.6, 0.5  # IoU above which two finds are one figure
MISSING = 0.1  # share of a model's weights that its folder may lack: transformers fills them with random ones


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A figure that text found: where it is, and how sure that is (0…1)."""

    given: Given
    score: float


class Segmenter(Protocol):
    """Finds figures in a picture, and makes trackers that follow them."""

    name: str

    def find(self, frame: np.ndarray, prompt: str) -> list[Found]:
        """Figures in a picture, uint8 [H, W, 3], the surest first."""
        ...

    def tracker(self, size: tuple[int, int]) -> Tracker: ...

    def close(self) -> None:
        """Give back the memory."""
        ...


class Sam2:
    """`Sam2VideoModel`, with `GroundingDinoForObjectDetection` where its folder is there."""

    name = "sam2"

    def __init__(self, folder: SegmenterFolder, device: Any, dtype: Any) -> None:
        from transformers import Sam2VideoModel

        self._model: Any = _opened(Sam2VideoModel, folder.model, device, dtype)
        self._taken = Taken((self._model.config.image_size,) * 2, MEAN, STD)
        self._detector = None if folder.detector is None else GroundingDino(folder.detector, device)

    def find(self, frame: np.ndarray, prompt: str) -> list[Found]:
        return [] if self._detector is None else self._detector.find(frame, prompt)

    def tracker(self, size: tuple[int, int]) -> Tracker:
        return Tracker(self._model, size, self._taken)

    def close(self) -> None:
        self._model = self._detector = None


class GroundingDino:
    """Boxes by text, in fp32 (its sampling of features is not written for less)."""

    def __init__(self, folder: Any, device: Any) -> None:
        import torch
        from transformers import AutoTokenizer, GroundingDinoForObjectDetection

        self._model: Any = _opened(GroundingDinoForObjectDetection, folder, device, torch.float32)
        self._words = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def find(self, frame: np.ndarray, prompt: str) -> list[Found]:
        import torch

        height, width = frame.shape[:2]
        with torch.inference_mode():
            picture = network_picture(frame, Taken(dino_size(height, width)))[None].to(self._model.device)
            words = self._words(dino_text(prompt), return_tensors="pt").to(self._model.device)
            out = self._model(
                pixel_values=picture, input_ids=words["input_ids"], attention_mask=words["attention_mask"]
            )
            scores = out.logits[0].sigmoid().amax(-1).float().cpu().numpy()
            middle, extent = out.pred_boxes[0].float().cpu().numpy().reshape(-1, 2, 2).transpose(1, 0, 2)
        corners = np.concatenate([middle - extent / 2, middle + extent / 2], 1) * [width, height, width, height]
        order = [i for i in np.argsort(-scores) if scores[i] > CONFIDENCE]
        boxes = [(np.clip(corners[i], 0, [width, height, width, height]), float(scores[i])) for i in order]
        return [Found(Given.box(box), score) for box, score in _distinct(boxes, box_iou, SAME_BOX)]


class Sam3:
    """`Sam3VideoModel`: its detector finds, its tracker follows, both on the features of one encoder."""

    name = "sam3"

    def __init__(self, folder: SegmenterFolder, device: Any, dtype: Any) -> None:
        from transformers import AutoTokenizer, Sam3VideoModel

        self._model: Any = _opened(Sam3VideoModel, folder.model, device, dtype)
        self._model.score_threshold_detection = CONFIDENCE
        self._words = AutoTokenizer.from_pretrained(folder.model, local_files_only=True)
        self._taken = Taken((self._model.config.image_size,) * 2, HALF, HALF)

    def find(self, frame: np.ndarray, prompt: str) -> list[Found]:
        import torch

        session = self._prompted(prompt)
        with torch.inference_mode():
            picture = network_picture(frame, self._taken).to(self._model.device, self._model.dtype)[None]
            vision = self._model.detector_model.get_vision_features(pixel_values=picture)
            found = self._model.run_detection(session, vision).values()
            scores = torch.cat([each["scores"] for each in found]).float()
            logits = torch.cat([each["mask"] for each in found])
            order = scores.argsort(descending=True).tolist()
            masks = [picture_masks(logits[i : i + 1], frame.shape[:2])[0] > 0 for i in order]
        sure = [(mask.cpu().numpy(), float(scores[i])) for mask, i in zip(masks, order, strict=True) if mask.any()]
        return [Found(Given(mask=mask), score) for mask, score in _distinct(sure, iou, SAME_MASK)]

    def tracker(self, size: tuple[int, int]) -> Tracker:
        def vision(picture: Tensor) -> Mapping[str, Any]:
            embedded = self._model.detector_model.get_vision_features(pixel_values=picture[None])
            features, codes = self._model.get_vision_features_for_tracker(vision_embeds=embedded)
            return {"vision_feats": features, "vision_pos_embeds": codes}

        return Tracker(self._model.tracker_model, size, self._taken, vision)

    def close(self) -> None:
        self._model = None

    def _prompted(self, prompt: str) -> Any:
        from transformers.models.sam3_video.modeling_sam3_video import Sam3VideoInferenceSession

        model = self._model
        session = Sam3VideoInferenceSession(inference_device=model.device, dtype=model.dtype)
        for text in phrases(prompt):
            number = session.add_prompt(text)
            words = self._words(
                text, return_tensors="pt", padding="max_length", max_length=SAM3_TOKENS, truncation=True
            ).to(model.device)
            session.prompt_input_ids[number] = words["input_ids"]
            session.prompt_attention_masks[number] = words["attention_mask"]
        return session


def phrases(prompt: str) -> list[str]:
    """ "person. dog." → person, dog."""
    return [part.strip().lower() for part in prompt.split(".") if part.strip()]


def dino_text(prompt: str) -> str:
    return "".join(f"{part}. " for part in phrases(prompt)).strip()


def dino_size(height: int, width: int) -> tuple[int, int]:
    """(H, W) with the shorter side `SHORT_SIDE`, unless the longer one would pass `LONG_SIDE`: then that."""
    short, long = sorted((height, width))
    scale = min(SHORT_SIDE / short, LONG_SIDE / long)
    return round(height * scale), round(width * scale)


def _distinct(
    found: Sequence[tuple[np.ndarray, float]], shared: Callable[[np.ndarray, np.ndarray], float], most: float
) -> list[tuple[np.ndarray, float]]:
    """Of those that share more than `most` the first, which is the surest."""
    kept: list[tuple[np.ndarray, float]] = []
    for place, score in found:
        if all(shared(place, other) <= most for other, _ in kept):
            kept.append((place, score))
    return kept


def import_networks(folder: SegmenterFolder) -> None:
    """Import what `open_segmenter` uses. This takes seconds, and an interrupt ends the process meanwhile, so it is done
    before anything is written. Raises InputError if `transformers` is missing."""
    try:
        from transformers import AutoTokenizer  # noqa: F401

        if folder.name == "sam2":
            from transformers import Sam2VideoModel  # noqa: F401
        else:
            from transformers import Sam3VideoModel  # noqa: F401
        if folder.detector is not None:
            from transformers import GroundingDinoForObjectDetection  # noqa: F401
    except ImportError as error:
        raise InputError(
            'Making masks needs the package transformers: pip install "scail2-rt[masks]", or give the masks.'
        ) from error


def open_segmenter(folder: SegmenterFolder, device: Any) -> Segmenter:
    """In fp32. InputError for what cannot be opened."""
    import torch

    try:
        return (Sam2 if folder.name == "sam2" else Sam3)(folder, device, torch.float32)
    except Exception as error:  # whatever a damaged file makes of it
        raise InputError(
            f"The segmenter in {folder.model} cannot be opened ({type(error).__name__}: {error}): download it again "
            f"with `scail2-rt download --segmenter {folder.name}`."
        ) from error


def _opened(kind: Any, folder: Any, device: Any, dtype: Any) -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()  # the command shows its own
    model, loaded = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
    if len(loaded["missing_keys"]) > MISSING * len(model.state_dict()):
        raise ValueError(f"it lacks {len(loaded['missing_keys'])} of {len(model.state_dict())} weights")
    return model.to(device).eval()
