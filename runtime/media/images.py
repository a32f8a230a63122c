"""Reads images with Pillow as viewers show them: 8-bit RGB, upright, without transparency.

HEIC needs the package `pillow-heif` (extra `heic`); AVIF is read by Pillow.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.case_folder import refuse_url
from scail2_rt.runtime.core.request import ImageSource
from scail2_rt.runtime.media.animated_webp import is_animated_webp

if TYPE_CHECKING:
    import PIL.Image

_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1")  # in the first box of an ISO media file
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif")


def load_image(source: ImageSource, background: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    """Read an image as RGB uint8 [H, W, 3]. Raises InputError if it is not a readable image.

    An array must have this form already. For a file or PIL image, the EXIF orientation is applied, grey and palette
    images are expanded, 16 bits are scaled to 8, and transparent pixels are blended with `background` (white, as in
    image viewers). Colour profiles are ignored, as in the official pipeline."""
    if isinstance(source, np.ndarray):
        return as_pixels(source, "An image in memory")
    with _opened(source) as image:
        if image.mode.startswith("I") or image.mode == "F":
            return _grey_to_rgb(np.asarray(image))
        return np.array(_flat(image, background))


def load_mask_image(source: ImageSource) -> np.ndarray:
    """`load_image` for masks: transparent pixels are black, which belongs to no class."""
    return load_image(source, background=(0, 0, 0))


def load_alpha(path: Path) -> np.ndarray | None:
    """The alpha channel of an image file, uint8 [H, W], 255 for opaque; None if it has none. Raises InputError if the
    file is not a readable image."""
    with _opened(path) as image:
        return np.array(image.convert("RGBA"))[..., 3] if image.has_transparency_data else None


def load_labels(path: Path) -> np.ndarray | None:
    """The label numbers stored in an image file, [H, W]: the indices of a palette image (not its colours), or grey
    levels of up to 32 bits. None for a colour image, whose channels differ. Raises InputError if the file is not a
    readable image."""
    with _opened(path) as image:
        levels = np.array(image.convert("RGB") if image.mode == "RGBA" else image)
    if levels.ndim == 2:
        return levels.astype(np.uint8) if levels.dtype == bool else levels
    colour = levels[..., :3] if levels.shape[-1] >= 3 else levels[..., :1]
    return levels[..., 0] if (colour == colour[..., :1]).all() else None


def is_image(path: Path) -> bool:
    """Whether a file is an image rather than a video, by the ending of its name. An animated WebP is a video."""
    ending = path.suffix.lower()
    return ending in _ENDINGS and not (ending == ".webp" and path.is_file() and is_animated_webp(path))


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder, without hidden files, sorted by the numbers in their names (frame 2 before frame
    10)."""

    def order(path: Path) -> list[tuple[int, str]]:
        parts = re.split(r"(\d+)", path.name)
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]

    shown = (file for file in folder.iterdir() if not file.name.startswith("."))  # "._1.png" is not the image 1.png
    return sorted((file for file in shown if is_image(file) and file.is_file()), key=order)


@contextmanager
def _opened(source: Path | str | PIL.Image.Image) -> Iterator[Any]:
    """Open an image with its EXIF orientation applied. Raises InputError if it is not a readable image."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(source, Image.Image):
        yield ImageOps.exif_transpose(source)
        return
    path = Path(source)
    check_file(path)
    if _is_heic(path):
        _register_heic(path)
    try:
        with Image.open(path) as opened:
            yield ImageOps.exif_transpose(opened)
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not an image that can be read: give a PNG, JPEG or WebP file.") from error
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is a damaged or unusable image ({error}): save it again as PNG or JPEG.") from error


def _is_heic(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:] in _HEIC_BRANDS


def _register_heic(path: Path) -> None:
    """Register the HEIC decoder with Pillow. Raises InputError if the package `pillow-heif` is not installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        raise InputError(
            f"{path} is a HEIC image, which needs the package pillow-heif: "
            "pip install 'scail2-rt[heic]', or save the image as PNG or JPEG."
        ) from error
    register_heif_opener()


def as_pixels(picture: Any, name: str) -> np.ndarray:
    """Convert an array or PIL image to RGB uint8 [H, W, 3], contiguous and writable. Transparent pixels become black,
    as in videos. Raises InputError, which mentions `name`, for other types and shapes."""
    pixels = np.asarray(_flat(picture, (0, 0, 0)) if hasattr(picture, "convert") else picture)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise InputError(
            f"{name} is {pixels.dtype} of shape {list(pixels.shape)}: give RGB pixels, uint8 [height, width, 3]."
        )
    return np.require(pixels, requirements=("C", "W"))  # PyTorch accepts no negative strides


def _flat(image: Any, background: tuple[int, int, int]) -> Any:
    """Convert a PIL image to RGB, with transparent pixels blended with `background`."""
    from PIL import Image

    if image.has_transparency_data:
        layers = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layers.size, (*background, 255)), layers)
    return image.convert("RGB")


def _grey_to_rgb(levels: np.ndarray) -> np.ndarray:
    """Grey levels [H, W] → RGB uint8 [H, W, 3]. A 16-bit type, or values above 255, are scaled from 16 bits to 8."""
    sixteen = levels.dtype.itemsize == 2 or levels.max(initial=0) > 255
    grey = np.clip(np.rint(levels / 257 if sixteen else levels), 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def check_file(path: Path) -> None:
    """Raise InputError unless `path` is a readable file with content."""
    refuse_url("file", path)
    if path.is_dir():
        raise InputError(f"{path} is a folder: give a file.")
    if not path.exists():
        raise InputError(f"{path} does not exist: check the path.")
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check its permissions.") from error
    if empty:
        raise InputError(f"{path} is empty: give a file with content.")
