"""NaN and infinity end a run where they appear, and finished segments are kept; in the session and through the
installed command. A segment of one colour gives a warning."""

import json
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from scail2_rt.engines.folder.store import STORE_NAME, StoreLayout
from scail2_rt.export.checkpoint.open import open_checkpoint
from scail2_rt.runtime import NotFinite, Output, Request, Session
from scail2_rt.runtime.core.progress import Progress
from scail2_rt.runtime.core.warnings import collecting
from scail2_rt.runtime.media.unfinished import partial_path
from scail2_rt.runtime.pipeline import constants, schedulers
from scail2_rt.runtime.pipeline.finite import colour_range, value_range, warn_if_flat
from tests.support.command import SMALL, Run, error_of, one_json, read_video

pytest_plugins = ["tests.support.runtime_fixtures"]
QUICK = {"steps": 2, "guidance": 1.0, "segment_length": 13, "frames": 17}  # segments 0..13, 8..17
# On a GPU one set of weights decodes the first frame and all others; on a CPU the first frame has a stage of its own.
FIRST_DECODED = "frame 0" if torch.cuda.is_available() else "frames 1 to 4"
VALUES = [float("nan"), float("inf"), float("-inf")]


@pytest.fixture(scope="module")
def session(engines: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    with Session.open(engines, backend="torch", prompt_cache=tmp_path_factory.mktemp("prompts")) as opened:
        yield opened


@pytest.fixture
def quick(request_of: Callable[..., Request]) -> Callable[..., Request]:
    return lambda **changes: request_of(**{**QUICK, **changes})


def frames_of(session: Session, request: Request) -> np.ndarray:
    return np.concatenate(list(session.animate(session.check(request))))


def spoil_step(monkeypatch: pytest.MonkeyPatch, number: int, value: float) -> None:
    """Set one value of the latent to NaN after this step (counted from 1 over all segments)."""
    step, calls = schedulers.Scheduler.step, []

    def spoiled(self: schedulers.Scheduler, velocity: Tensor, x: Tensor) -> Tensor:
        calls.append(None)
        x = step(self, velocity, x)
        if len(calls) == number:
            x[3, -1, 2, 1] = value
        return x

    monkeypatch.setattr(schedulers.Scheduler, "step", spoiled)


def spoil_pixels(monkeypatch: pytest.MonkeyPatch, number: int, value: float) -> None:
    """Set one value of this decoded group to NaN."""
    decode, calls = constants.decode_unclamped, []

    def spoiled(*arguments: object) -> Generator[Tensor, None, None]:
        for pixels in decode(*arguments):  # type: ignore[arg-type]
            calls.append(None)
            if len(calls) == number:
                pixels = pixels.clone()
                pixels[1, -1, 5, 7] = value
            yield pixels

    monkeypatch.setattr(constants, "decode_unclamped", spoiled)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(
    ("spoil", "number", "says"),
    [
        (spoil_step, 4, "The latent has NaN or infinite values after step 2 of 2 of segment 2 of 2, so the run ends"),
        (spoil_pixels, 6, "The decoded picture has NaN or infinite values in frames 1 to 4 of segment 2 of 2, so"),
    ],
)
def test_finished_segments_stay_and_the_run_can_go_on(
    session: Session,
    quick: Callable[..., Request],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[..., None],
    number: int,
    says: str,
    value: float,
) -> None:
    expected = frames_of(session, quick())
    spoil(monkeypatch, number, value)
    with pytest.raises(NotFinite) as caught:
        session.generate(session.check(quick()), tmp_path / "a.mp4")
    message = str(caught.value)
    assert message.startswith(says)
    for cause in ("LoRA strength", "no LoRA is fused", "fp16", "these are fp32", "scail2-rt verify"):
        assert cause in message
    assert caught.value.exit_code == 1
    assert session.engines.loaded == ()
    assert read_video(partial_path(tmp_path / "a.mp4")).frames == 13
    report = json.loads((tmp_path / "a.json").read_text())
    assert (report["status"], report["error"]) == ("partial", f"NotFinite: {message}")
    monkeypatch.undo()
    result = session.generate(session.check(quick()), Output(tmp_path / "a.mp4", resume=True))
    assert (result.resumed, result.frames) == (1, 17)
    assert np.array_equal(frames_of(session, quick()), expected)


def test_a_first_segment_leaves_a_report_alone(
    session: Session, quick: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_pixels(monkeypatch, 1, float("nan"))
    with pytest.raises(NotFinite, match="in frame 0 of segment 1 of 2"):
        session.generate(session.check(quick()), tmp_path / "a.mp4")
    assert json.loads((tmp_path / "a.json").read_text())["status"] == "failed"
    assert not (tmp_path / "a.mp4").exists()


def test_a_segment_of_one_colour_is_a_warning(
    session: Session, quick: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, segments = constants.decode_unclamped, []

    def flat(*arguments: object) -> Generator[Tensor, None, None]:
        segments.append(None)
        first = len(segments) == 1
        for pixels in decode(*arguments):  # type: ignore[arg-type]
            yield torch.full_like(pixels, -3.0) + 0.1 * pixels if first else pixels

    monkeypatch.setattr(constants, "decode_unclamped", flat)
    result = session.generate(session.check(quick()), tmp_path / "a.mp4")
    (warning,) = result.warnings
    assert warning.startswith(
        "Segment 1 of 2 is one flat colour from its first frame to its last (red, green, blue 0, 0, 0)"
    )
    assert result.report["status"] == "complete"


def test_what_is_flat() -> None:
    """A segment of two neighbouring 8-bit levels counts as one colour; not so with one different pixel, or with a
    colour that changes over time."""
    at = Progress("decode", 1, 1)
    grey = torch.full((3, 4, 8, 8), 0.5)
    other = grey.clone()
    other[2, 3, 7, 7] = 0.52

    def told(*groups: Tensor) -> list[str]:
        found: list[str] = []
        with collecting(found):
            warn_if_flat([colour_range(group) for group in groups], at)
        return found

    assert told(grey, grey + 0.007)
    assert told(grey + 1, grey + 0.9)  # white, since pixels end at 1
    assert not told(grey, other)
    assert not told(grey, grey + 0.1)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_value_among_many_is_seen(dtype: torch.dtype, value: float) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(3, 4, 67, 129, device=device).to(dtype)
    for index in (0, 70_001, x.numel() - 1):
        spoiled = x.clone()
        spoiled.view(-1)[index] = value
        for seen in (value_range(spoiled), colour_range(spoiled)):
            assert not seen.isfinite().all()
    assert value_range(x).tolist() == [x.min().item(), x.max().item()]
    assert colour_range(x).shape == (2, 3)


# through the installed command


@pytest.fixture(scope="module")
def lora(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows, columns = open_checkpoint(tiny_checkpoint).sources["dit"].shape("blocks.0.ffn.0.weight")
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("lora") / "light.safetensors"
    tensors = {"down": torch.randn(4, columns, generator=generator), "up": torch.randn(rows, 4, generator=generator)}
    save_file({f"blocks.0.ffn.0.lora_{part}.weight": tensor for part, tensor in tensors.items()}, path)
    return path


def test_an_absurd_lora_strength(scail2: Run, tiny_checkpoint: Path, lora: Path, case: Path, tmp_path: Path) -> None:
    """A NaN in a dtype that can store it ends the run at the first step; for a dtype that cannot, the build refuses it.
    On the CPU, also where there is a GPU: its kernels turn these numbers into zeros, not into NaN."""
    words = ("build-engines", tiny_checkpoint, "-o", tmp_path / "e", "--backend", "torch", "--precision", "bf16")
    refused = error_of(scail2(*words, "--lora", f"{lora}:1e39"))
    assert "tensor blocks.0.ffn.0.weight has NaN or infinite values once the LoRA is fused into it" in refused
    assert f"{lora} at strength 1e+39. Use a smaller strength" in refused
    assert scail2(*words, "--lora", f"{lora}:1e30", "--rebuild").returncode == 0
    words = ("generate", tmp_path / "e", "--case", case, "-o", tmp_path / "a.mp4", *SMALL)
    result = scail2(*words, CUDA_VISIBLE_DEVICES="")
    message = error_of(result, code=1)
    assert message.startswith("The latent has NaN or infinite values after step 1 of 2 of segment 1 of 2")
    assert "these engines hold light.safetensors at strength 1e+30: build them with a smaller strength" in message
    assert "these are bf16" in message
    assert "no segment was finished" in result.stderr
    assert json.loads((tmp_path / "a.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        ("dit.blocks.1.mid.norm3.weight", "The latent has NaN or infinite values after step 1 of 2 of segment 1 of 2"),
        ("umt5.final.norm.weight", "The latent has NaN or infinite values after step 1 of 2 of segment 1 of 2"),
        ("vae.decode_step", f"The decoded picture has NaN or infinite values in {FIRST_DECODED} of segment 1 of 2"),
    ],
)
def test_one_nan_in_the_store(
    scail2: Run, engines: Path, tiny_checkpoint: Path, case: Path, tmp_path: Path, tensor: str, says: str
) -> None:
    folder = tmp_path / "e"
    shutil.copytree(engines, folder)
    store = folder / "stages" / STORE_NAME
    layout = StoreLayout.read(store)
    name = next(name for name in layout.names if name.startswith(tensor))
    place = layout.location(name)
    assert place.dtype == torch.float32
    with store.open("r+b") as file:
        file.seek(place.offset + place.length - 4)
        file.write(b"\x00\x00\xc0\x7f")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sums"]  # with checksums the damage would be reported before any computation
    (folder / "manifest.json").write_text(json.dumps(manifest))
    words = ("generate", folder, "--case", case, "-o", tmp_path / "a.mp4", *SMALL)
    unused = {"SCAIL2_RT_CACHE": str(tmp_path / "cache")}  # a cached prompt encoding would hide the damage
    assert error_of(scail2(*words, **unused), code=1).startswith(says)
    assert not (tmp_path / "a.mp4").exists()
    if not name.startswith("dit."):
        return
    verified = scail2("verify", folder, "--checkpoint", tiny_checkpoint, "--json")
    assert verified.returncode == 1
    (check,) = [check for check in one_json(verified)["checks"] if check["name"] == "weights"]
    assert f"{name} (1 NaN or infinite value" in check["detail"]
