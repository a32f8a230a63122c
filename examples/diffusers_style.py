"""Engines behind the calling convention of diffusers' video pipelines, for code that is written for those.

    pipe = Scail2Pipeline.from_pretrained("engines/")
    frames = pipe(image, driving, mask_image, mask_video, prompt="a girl dances").frames[0]

    python examples/diffusers_style.py ENGINES CASE -o out.gif

What differs from diffusers: there is no `.to(device)` and no `torch_dtype` (the engine folder decides both), guidance
of 1 or less runs one pass, and a `torch.Generator` stands for its seed alone, so that equal seeds give equal noise on
any machine."""

import argparse
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from scail2_rt.runtime import Clip, Progress, Request, Session
from scail2_rt.runtime.core.case_folder import read_case

Picture = Image.Image | np.ndarray | Path | str
Film = Sequence[Image.Image] | np.ndarray | torch.Tensor | Path | str
StepEnd = Callable[["Scail2Pipeline", int, int, dict[str, Any]], object]


@dataclass(frozen=True)
class Scail2Output:
    """frames: one list of PIL images, or one array or tensor [T, H, W, 3] in 0..1, in a list."""

    frames: list[Any]


class Scail2Pipeline:
    """Use as a context manager, or call `close`."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.interrupt = False

    @classmethod
    def from_pretrained(cls, folder: Path | str, **options: Any) -> "Scail2Pipeline":
        """An engine folder of `scail2-rt build-engines`; options are those of `Session.open`."""
        return cls(Session.open(folder, **options))

    def __call__(
        self,
        image: Picture,
        driving: Film,
        mask_image: Picture,
        mask_video: Film,
        prompt: str = "",
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 40,
        guidance_scale: float = 5.0,
        generator: torch.Generator | None = None,
        frame_rate: Fraction | float = 16,
        output_type: str = "pil",
        callback_on_step_end: StepEnd | None = None,
        **options: Any,
    ) -> Scail2Output:
        """options: further fields of `Request`, such as mode, shift or segment_length. Setting `interrupt` in the
        callback ends the run with `Cancelled`. InputError for what does not fit together."""
        self.interrupt = False
        request = Request(
            image,
            mask_image,
            film(driving, frame_rate),
            film(mask_video, frame_rate),
            prompt=prompt,
            negative_prompt=negative_prompt,
            size=None if height is None or width is None else (height, width),
            frames=num_frames,
            steps=num_inference_steps,
            guidance=guidance_scale,
            seed=0 if generator is None else generator.initial_seed() % 2**63,
            **options,
        )
        plan = self.session.check(request)

        cancel = threading.Event()

        def told(event: Progress) -> None:
            if callback_on_step_end is not None and event.phase == "denoise" and event.step:
                callback_on_step_end(self, event.step - 1, event.steps, {"segment": event.segment})
            if self.interrupt:
                cancel.set()

        frames = np.concatenate(list(self.session.animate(plan, told, cancel)))
        return Scail2Output([converted(frames, output_type)])

    def close(self) -> None:
        self.session.close()

    def __enter__(self) -> "Scail2Pipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def film(frames: Film, rate: Fraction | float) -> Any:
    """A path, or frames as a clip: PIL images, an array uint8 or a tensor [T, H, W, 3] in 0..1."""
    if isinstance(frames, Path | str):
        return frames
    if isinstance(frames, torch.Tensor):
        return Clip(Levels(frames), rate)  # type: ignore[arg-type]
    return Clip(frames, rate)  # type: ignore[arg-type]


class Levels:
    """A float tensor as 8-bit frames that are made when they are read: `Clip` takes what can be sliced."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.shape = tensor, tensor.shape

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, index: int | slice) -> np.ndarray:
        pixels: np.ndarray = self.tensor[index].mul(255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        return pixels

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[number] for number in range(len(self)))


def converted(frames: np.ndarray, output_type: str) -> Any:
    """uint8 [T, H, W, 3] as diffusers' `pil`, `np` or `pt`."""
    if output_type == "pil":
        return [Image.fromarray(frame) for frame in frames]
    floats = frames.astype(np.float32) / 255
    return torch.from_numpy(floats) if output_type == "pt" else floats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", type=Path)
    parser.add_argument("case", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("out.gif"))
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    given = parser.parse_args()
    files = read_case(given.case)
    with Scail2Pipeline.from_pretrained(given.engines) as pipe:
        first, *rest = pipe(
            files.image,
            files.driving,
            files.mask_image,
            files.mask_video,
            height=given.height,
            width=given.width,
            num_inference_steps=6,
            guidance_scale=1.0,
            scheduler="euler",
            shift=5.0,
            mode=files.mode,
            generator=torch.Generator().manual_seed(0),
        ).frames[0]
    first.save(given.output, save_all=True, append_images=rest, duration=62, loop=0)


if __name__ == "__main__":
    main()
