"""Placement of an image (a reference image or a driving frame) in the output frame, as a window.

`official` scales the image to cover the frame and shows the centre, as the official code does. `crop` uses the same
scale and shows another part. `pad` shows the complete image with margins. Margins are black in the image, and black in
the mask, which both modes read as hidden. An image and its mask always use the same window, even if their sizes differ.
"""

from dataclasses import dataclass
from typing import Any, Literal

from scail2_rt.runtime.core.geometry import covering_size

Fit = Literal["auto", "official", "crop", "pad"]
Way = Literal["official", "crop", "pad"]
FITS = ("auto", "official", "crop", "pad")
Size = tuple[int, int]  # (H, W) in pixels
Part = tuple[float, float, float, float]  # (top, bottom, left, right) as shares of an image's sides


@dataclass(frozen=True, slots=True)
class Window:
    """An image of the size `source` is scaled to height × width and placed in `frame`; sizes are (H, W) in pixels.

    top, left: position of its corner in the frame, in pixels; negative if it is cut off there."""

    way: Way
    source: Size
    frame: Size
    height: int
    width: int
    top: int
    left: int

    @classmethod
    def official(cls, source: Size, frame: Size) -> "Window":
        """Cover the frame and show the centre. Source: zai-org/SCAIL-2 `sample_video.py`."""
        height, width = covering_size(*source, *frame)
        return cls("official", source, frame, height, width, -((height - frame[0]) // 2), -((width - frame[1]) // 2))

    @classmethod
    def cropped(cls, source: Size, frame: Size, top: float, left: float) -> "Window":
        """Cover the frame and show the part that begins at `top` and `left`, shares of the image's sides. They are
        limited so that the image fills the frame."""
        height, width = covering_size(*source, *frame)
        corner = (
            -min(max(round(share * side), 0), side - shown)
            for share, side, shown in zip((top, left), (height, width), frame, strict=True)
        )
        return cls("crop", source, frame, height, width, *corner)

    @classmethod
    def padded(cls, source: Size, frame: Size) -> "Window":
        """Show the complete image in the centre of the frame."""
        scale = min(frame[0] / source[0], frame[1] / source[1])
        height, width = (max(1, min(round(scale * side), most)) for side, most in zip(source, frame, strict=True))
        return cls("pad", source, frame, height, width, (frame[0] - height) // 2, (frame[1] - width) // 2)

    @property
    def part(self) -> Part:
        """The visible part of the image."""
        top, left = max(0, -self.top) / self.height, max(0, -self.left) / self.width
        bottom, right = (self.frame[0] - self.top) / self.height, (self.frame[1] - self.left) / self.width
        return top, min(bottom, 1.0), left, min(right, 1.0)

    def part_of_mask(self, mask: Size) -> Part:
        """The visible part of a mask of this size: that of the image, except that `official` crops a mask by its own
        aspect ratio."""
        return Window.official(mask, self.frame).part if self.way == "official" else self.part

    @property
    def margins(self) -> str:
        """The sides of the frame with margins, as "left and right" or "above and below"; "" without margins."""
        sides = {"above and below": self.height < self.frame[0], "left and right": self.width < self.frame[1]}
        return ", ".join(name for name, there in sides.items() if there)

    @property
    def described(self) -> dict[str, Any]:
        """For JSON. `shown` is (top, bottom, left, right) in pixels of the image, `placed` is (top, left, height,
        width) of the scaled image in pixels of the frame."""
        rows, columns = self.source
        shown = [round(share * side, 1) for share, side in zip(self.part, (rows, rows, columns, columns), strict=True)]
        return {
            "way": self.way,
            "source": list(self.source),
            "frame": list(self.frame),
            "shown": shown,
            "placed": [self.top, self.left, self.height, self.width],
        }
