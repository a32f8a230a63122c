"""How the torch backend places weights, with a CPU in place of a GPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from scail2_rt.engines.build.build import BuildRequest, build
from scail2_rt.engines.engine_set import EngineSet, open_engines
from scail2_rt.engines.torch_backend.backend import TorchExecutor
from scail2_rt.engines.torch_backend.vae_streams import DecodeStream, EncodeStream
from scail2_rt.engines.vae_stream import StagedVAEStream
from scail2_rt.export.checkpoint.open import open_checkpoint
from scail2_rt.kernels.errors import InputError


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("vae") / "e"
    checkpoint = open_checkpoint(tiny_checkpoint, components=("vae",))
    build(BuildRequest(tiny_checkpoint, directory, ("torch",), "fp32"), checkpoint)
    return directory


@pytest.fixture
def engines(folder: Path) -> Iterator[EngineSet]:
    with open_engines(folder, "torch", device="cpu") as opened:
        assert isinstance(opened.executor, TorchExecutor)
        opened.executor._on_gpu = True  # after opening: its parts work on either device
        yield opened


def test_the_vae_has_a_form_with_rings(engines: EngineSet) -> None:
    """The stream gives the results of the stages, is made once, and restarts at every request, whether closed or
    not."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(16, 3, 2, 3, generator=generator)
    staged = StagedVAEStream(engines.executor, "vae.decode")
    expected = torch.cat([staged.step(frame) for frame in latent.split(1, dim=1)], dim=1)
    first = engines.vae_stream("vae.decode")
    assert isinstance(first, DecodeStream)
    for closed in (False, True, True):
        stream = engines.vae_stream("vae.decode")
        assert stream is first
        pixels = torch.cat([stream.step(frame) for frame in latent.split(1, dim=1)], dim=1)
        torch.testing.assert_close(pixels, expected, atol=1e-4, rtol=1e-4)
        if closed:
            stream.close()
    assert isinstance(engines.vae_stream("vae.encode"), EncodeStream)
    engines.release("vae.decode")
    assert engines.vae_stream("vae.decode") is not first


def test_stages_are_loaded_ahead_and_share_buffers(engines: EngineSet) -> None:
    engines.prefetch(["vae.decode_first"])
    assert engines.loaded == ()
    inputs = torch.zeros(1, 16, 1, 2, 3)
    expected = engines.run("vae.decode_first", inputs)
    assert engines.loaded == ("vae.decode_first",)
    engines.stream(["vae.decode_first"])
    assert (engines.loaded, engines.streamed) == ((), ("vae.decode_first",))
    torch.testing.assert_close(engines.run("vae.decode_first", inputs), expected)
    engines.stream([])
    assert engines.streamed == ()


def test_a_folder_without_a_vae_is_named(folder: Path, engines: EngineSet) -> None:
    with pytest.raises(InputError, match=r"has no stage vae\.other_step"):
        engines.vae_stream("vae.other")
