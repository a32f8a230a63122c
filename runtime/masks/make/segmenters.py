"""Segmenters, which detect characters by text and create trackers: SAM 2 with Grounding DINO, or SAM 3.

Both use classes of `transformers` with weights from a folder. A `Segmenter` detects characters in one image, as boxes
or masks. The rules about identities and colours are in `follow` and `pairs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.masks.make.figures import box_iou, iou
from scail2_rt.runtime.masks.make.pixels import HALF, MEAN, STD, InputFormat, network_picture, picture_masks
from scail2_rt.runtime.masks.make.tracker import Given, Tracker

if TYPE_CHECKING:
    from torch import Tensor

    from scail2_rt.runtime.masks.make.folders import SegmenterFolder

CONFIDENCE = 0.25  # least score of a detection: that of the official code for SAM 3, and the default of Grounding DINO
SHORT_SIDE, LONG_SIDE = 800, 1333  # pixels of the input of Grounding DINO
SAM3_TOKENS = 32  # length of the padded text
SAME_BOX, SAME_MASK = 0.6, 0.5  # IoU above which two detections are one character
MISSING = 0.1  # share of its weights that a model may lack; transformers initialises them randomly


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A detected character: its prompt for a tracker, and its score, 0 to 1."""

    given: Given
    score: float


class Segmenter(Protocol):
    """Detects characters in an image, and creates trackers."""

    name: str

    def find(self, frame: np.ndarray, prompt: str) -> list[Found]:
        """Detect characters in an image, uint8 [H, W, 3], by a text prompt. The highest score comes first."""
        ...

    def tracker(self, size: tuple[int, int]) -> Tracker:
        """Create a tracker for frames of `size` (H, W)."""
        ...

    def close(self) -> None:
        """Release the memory of the model."""
        ...


class Sam2:
    """`Sam2VideoModel`, with `GroundingDinoForObjectDetection` as detector if the folder has one."""

    name = "sam2"

    def __init__(self, folder: SegmenterFolder, device: Any, dtype: Any) -> None:
        from transformers import Sam2VideoModel

        self._model: Any = _opened(Sam2VideoModel, folder.model, device, dtype)
        self._format = InputFormat((self._model.config.image_size,) * 2, MEAN, STD)
        self._detector = None if folder.detector is None else GroundingDino(folder.detector, device)

    def find(self, frame: np.ndarray, prompt: str) -> list[Found]:
        return [] if self._detector is None else self._detector.find(frame, prompt)

    def tracker(self, size: tuple[int, int]) -> Tracker:
        return Tracker(self._model, size, self._format)

    def close(self) -> None:
        self._model = self._detector = None


class GroundingDino:
    """Detects boxes by text in fp32, because its feature sampling does not support other types."""

    def __init__(self, folder: Any, device: Any) -> None:
        import torch
        from transformers import AutoTokenizer, GroundingDinoForObjectDetection

        self._model: Any = _opened(GroundingDinoForObjectDetection, folder, device, torch.float32)
        self._words = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def find(self, frame: np.ndarray, prompt: str) -> list[Found]:
        import torch

        height, width = frame.shape[:2]
        with torch.inference_mode():
            picture = network_picture(frame, InputFormat(dino_size(height, width)))[None].to(self._model.device)
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
    """`Sam3VideoModel`, whose detector and tracker share the features of one encoder."""

    name = "sam3"

    def __init__(self, folder: SegmenterFolder, device: Any, dtype: Any) -> None:
        from transformers import AutoTokenizer, Sam3VideoModel

        self._model: Any = _opened(Sam3VideoModel, folder.model, device, dtype)
        self._model.score_threshold_detection = CONFIDENCE
        self._words = AutoTokenizer.from_pretrained(folder.model, local_files_only=True)
        self._format = InputFormat((self._model.config.image_size,) * 2, HALF, HALF)

    def find(self, frame: np.ndarray, prompt: str) -> list[Found]:
        import torch

        session = self._prompted(prompt)
        with torch.inference_mode():
            picture = network_picture(frame, self._format).to(self._model.device, self._model.dtype)[None]
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

        return Tracker(self._model.tracker_model, size, self._format, vision)

    def close(self) -> None:
        self._model = None

    def _prompted(self, prompt: str) -> Any:
        """A session of the detector with the phrases of a prompt."""
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
    """Split a prompt at full stops: "Person. dog." → person, dog."""
    return [part.strip().lower() for part in prompt.split(".") if part.strip()]


def dino_text(prompt: str) -> str:
    """A prompt in the form that Grounding DINO expects: "person. dog."."""
    return "".join(f"{part}. " for part in phrases(prompt)).strip()


def dino_size(height: int, width: int) -> tuple[int, int]:
    """Scale (H, W) so that the shorter side is `SHORT_SIDE`, or the longer one `LONG_SIDE` if it would be longer."""
    short, long = sorted((height, width))
    scale = min(SHORT_SIDE / short, LONG_SIDE / long)
    return round(height * scale), round(width * scale)


def _distinct(
    found: Sequence[tuple[np.ndarray, float]], shared: Callable[[np.ndarray, np.ndarray], float], most: float
) -> list[tuple[np.ndarray, float]]:
    """Remove detections that overlap an earlier one, with a higher score, by more than `most`. shared: overlap of
    two."""
    kept: list[tuple[np.ndarray, float]] = []
    for place, score in found:
        if all(shared(place, other) <= most for other, _ in kept):
            kept.append((place, score))
    return kept


def import_networks(folder: SegmenterFolder) -> None:
    """Import the classes that `open_segmenter` uses, before anything is written, because this takes seconds and an
    interrupt during an import can end the process. Raises InputError if `transformers` is missing."""
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
    """Open a segmenter in fp32 on a device. Raises InputError if its files are damaged."""
    import torch

    try:
        return (Sam2 if folder.name == "sam2" else Sam3)(folder, device, torch.float32)
    except Exception as error:  # damaged files raise errors of many types
        raise InputError(
            f"The segmenter in {folder.model} cannot be opened ({type(error).__name__}: {error}): download it again "
            f"with `scail2-rt download --segmenter {folder.name}`."
        ) from error


def _opened(kind: Any, folder: Any, device: Any, dtype: Any) -> Any:
    """Load a model from a folder. Raises ValueError if too many of its weights are missing."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # the command has its own progress bar
    model, loaded = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
    if len(loaded["missing_keys"]) > MISSING * len(model.state_dict()):
        raise ValueError(f"it lacks {len(loaded['missing_keys'])} of {len(model.state_dict())} weights")
    return model.to(device).eval()
