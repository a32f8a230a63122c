"""One flipped bit in an engine folder."""

from pathlib import Path

from scail2_rt.engines.folder.store import StoreLayout

STORE = "stages/weights.safetensors"


def flip(path: Path, place: int, bit: int = 0) -> None:
    """Flip one bit of the byte at `place` (from the end if negative); nothing else changes."""
    with path.open("r+b") as file:
        file.seek(place, 0 if place >= 0 else 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1 << bit]))


def flip_tensor(folder: Path, name: str, place: int = 5, bit: int = 0) -> None:
    """Flip one bit of a tensor in the weight store."""
    flip(folder / STORE, StoreLayout.read(folder / STORE).location(name).offset + place, bit)
