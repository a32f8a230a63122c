"""Where a picture lies in the frame: the window through which a reference image, or the driving video, is seen.

`official` scales to cover the frame and shows the middle, as the public code does. `crop` has the same scale and shows
another part. `pad` shows the whole picture with margins, which are black in the picture and, in the mask, in the colour
that both modes hide: black. A picture and its mask always go through the same window, whatever the mask's own size.
"""

from dataclasses import dataclass
from typing import Any, Literal

from scail2_rt.runtime.core.geometry import covering_size

Fit = Literal["auto", "official", "crop", "pad"]
Way = Literal["official", "crop", "pad"]
FITS = ("auto", "official", "crop", "pad")
Size = tuple[int, int]  # (H, W) in pixels
Part = tuple[float, float, float, float]  # (top, bottom, left, right) as shares of a picture's sides


@dataclass(frozen=True, slots=True)
class Window:
    """A picture of the size `source` is scaled to height × width and laid into `frame`, all (H, W) in pixels.

    top, left: of its corner in the frame; below 0 where it is cut off there."""

    way: Way
    source: Size
    frame: Size
    height: int
    width: int
    top: int
    left: int

    @classmethod
    def official(cls, source: Size, frame: Size) -> "Window":
        """Covers the frame; the middle is shown. Source: zai-org/SCAIL-2 `sample_video.py`."""
        height, width = covering_size(*source, *frame)
        return cls("official", source, frame, height, width, -((height - frame[0]) // 2), -((width - frame[1]) // 2))

    @classmethod
    def cropped(cls, source: Size, frame: Size, top: float, left: float) -> "Window":
        """Covers the frame; what is shown begins at these shares of the picture's sides, as far as there is picture."""
        height, width = covering_size(*source, *frame)
        corner = (
            -min(max(round(share * side), 0), side - shown)
            for share, side, shown in zip((top, left), (height, width), frame, strict=True)
        )
        return cls("crop", source, frame, height, width, *corner)

    @classmethod
    def padded(cls, source: Size, frame: Size) -> "Window":
        """The whole picture in the middle of the frame."""
        scale = min(frame[0] / source[0], frame[1] / source[1])
        height, width = (max(1, min(round(scale * side), most)) for side, most in zip(source, frame, strict=True))
        return cls("pad", source, frame, height, width, (frame[0] - height) // 2, (frame[1] - width) // 2)

    @property
    def part(self) -> Part:
        """What of the picture is shown."""
        top, left = max(0, -self.top) / self.height, max(0, -self.left) / self.width
        bottom, right = (self.frame[0] - self.top) / self.height, (self.frame[1] - self.left) / self.width
        return top, min(bottom, 1.0), left, min(right, 1.0)

    def part_of_mask(self, mask: Size) -> Part:
        """What is shown of a mask of this size: the same part, but that the official way scales a mask by itself."""
        return Window.official(mask, self.frame).part if self.way == "official" else self.part

    @property
    def margins(self) -> str:
        """`left and right`, `above and below` where the frame shows no picture, else ""."""
        sides = {"above and below": self.height < self.frame[0], "left and right": self.width < self.frame[1]}
        return ", ".join(name for name, there in sides.items() if there)

    @property
    def described(self) -> dict[str, Any]:
        """For JSON. `shown` is (top, bottom, left, right) in pixels of the picture, `placed` (top, left, height, width)
        of the scaled picture in the frame."""
        rows, columns = self.source
        shown = [round(share * side, 1) for share, side in zip(self.part, (rows, rows, columns, columns), strict=True)]
        return {
            "way": self.way,
            "source": list(self.source),
            "frame": list(self.frame),
            "shown": shown,
            "placed": [self.top, self.left, self.height, self.width],
        }
