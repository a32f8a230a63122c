"""Loading weights in the background: they equal those of the store, in any order and with shared buffers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scail2_rt.engines.folder.store import StoreLayout, StoreReader, StoreWriter, SummingWriter, TensorShape
from scail2_rt.engines.folder.sums import PIECE, DamagedError, SumChecker, Sums, joined
from scail2_rt.engines.torch_backend.loading import StageStream, WeightLoader, buffer_bytes, carve
from scail2_rt.kernels.errors import InputError
from tests.support.damage import flip

STAGES = [f"s{i}" for i in range(5)]
TENSORS = {"weight": TensorShape(torch.bfloat16, (33, 7)), "bias": TensorShape(torch.float32, (5,))}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StoreReader]:
    shapes = {f"{stage}.{name}": shape for stage in STAGES for name, shape in TENSORS.items()}
    writer = StoreWriter(tmp_path / "w.safetensors", StoreLayout.plan(shapes))
    for seed, (name, shape) in enumerate(shapes.items()):
        writer.write(name, torch.randn(shape.shape, generator=torch.Generator().manual_seed(seed)).to(shape.dtype))
    writer.finish()
    reader = StoreReader(tmp_path / "w.safetensors")
    yield reader
    reader.close()


def same(tensors: dict[str, Tensor], store: StoreReader, stage: str) -> bool:
    return all(torch.equal(tensors[name].cpu(), store.get(f"{stage}.{name}")) for name in TENSORS)


@pytest.fixture
def loader(store: StoreReader) -> Iterator[WeightLoader]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = WeightLoader(store, device)
    yield made
    made.close()


def test_a_stage_arrives_whole(store: StoreReader, loader: WeightLoader) -> None:
    for stage, loading in [(stage, loader.start(stage, TENSORS)) for stage in STAGES]:
        assert same(loading.wait(), store, stage)


def test_views_are_aligned_and_apart() -> None:
    buffer = torch.zeros(buffer_bytes(TENSORS), dtype=torch.uint8)
    views = carve(buffer, TENSORS)
    assert [view.data_ptr() - buffer.data_ptr() for view in views.values()] == [0, 512]
    views["weight"].fill_(1)
    assert views["bias"].abs().sum() == 0


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4] * 2, [3, 0, 0, 4, 1], [4, 3, 2, 1, 0]])
def test_a_stream_gives_each_stage_its_weights_in_any_order(
    order: list[int], store: StoreReader, loader: WeightLoader
) -> None:
    stream: StageStream[dict[str, Tensor]] = StageStream(loader, STAGES, TENSORS, dict)
    for index in order:
        assert same(stream.take(STAGES[index]), store, STAGES[index])
    buffers = {id(slot[0]) for slot in (*stream._free, *(ahead[1] for ahead in stream._ahead), stream._current or ())}
    assert len(buffers) == 2
    stream.close()


def test_a_long_tensor_is_read_in_pieces(tmp_path: Path) -> None:
    shape = TensorShape(torch.uint8, (PIECE + 12345,))
    writer = StoreWriter(tmp_path / "w.safetensors", StoreLayout.plan({"a.x": shape}))
    values = torch.randint(0, 256, shape.shape, dtype=torch.uint8)
    writer.write("a.x", values)
    writer.finish()
    reader = StoreReader(tmp_path / "w.safetensors")
    loader = WeightLoader(reader, torch.device("cpu"))
    loading = loader.start("a", {"x": shape})
    assert len(loading.pieces) == 2
    assert torch.equal(loading.wait()["x"], values)
    loader.close()
    reader.close()


def test_a_store_that_shrank_is_told(tmp_path: Path, store: StoreReader, loader: WeightLoader) -> None:
    with store.path.open("r+b") as file:
        file.truncate(store.layout.size // 2)
    last = store.layout.names[-1].partition(".")[0]
    loading = loader.start(last, TENSORS)
    with pytest.raises(InputError, match="ends before the tensor"):
        loading.wait()


class TestSums:
    @pytest.fixture
    def summed(self, store: StoreReader) -> StoreReader:
        sums = Sums("", {name: joined(store.pieces(name)) for name in store.layout.names}, {})
        store.checker = SumChecker(store.path, sums, "the command")
        return store

    def damage(self, store: StoreReader, name: str = "s2.weight") -> None:
        flip(store.path, store.layout.location(name).offset + 4)

    def test_a_damaged_stage_does_not_arrive(self, summed: StoreReader, loader: WeightLoader) -> None:
        self.damage(summed)
        loadings = [loader.start(stage, TENSORS) for stage in STAGES]
        for stage, loading in zip(STAGES, loadings, strict=True):
            if stage == "s2":
                with pytest.raises(DamagedError, match=r"stage s2 of .*tensor s2\.weight.*with: the command"):
                    loading.wait()
            else:
                assert same(loading.wait(), summed, stage)
        loader.start("s2", TENSORS).settle()  # the result is not needed, so the error is not reported

    def test_every_load_is_checked(self, summed: StoreReader, loader: WeightLoader) -> None:
        loader.start("s2", TENSORS).wait()
        self.damage(summed)
        with pytest.raises(DamagedError):
            loader.start("s2", TENSORS).wait()

    def test_a_stream_checks_in_its_first_pass(self, summed: StoreReader, loader: WeightLoader) -> None:
        stream: StageStream[dict[str, Tensor]] = StageStream(loader, STAGES, TENSORS, dict)
        for stage in STAGES:
            stream.take(stage)
        stream.take("s0")
        self.damage(summed)
        for stage in STAGES:
            stream.take(stage)
        stream.close()

    def test_a_stream_finds_a_damaged_stage(self, summed: StoreReader, loader: WeightLoader) -> None:
        self.damage(summed)
        stream: StageStream[dict[str, Tensor]] = StageStream(loader, STAGES, TENSORS, dict)
        stream.take("s0")
        stream.take("s1")
        with pytest.raises(DamagedError, match="stage s2"):
            stream.take("s2")
        stream.close()

    def test_pieces_of_a_long_tensor(self, tmp_path: Path) -> None:
        shape = TensorShape(torch.uint8, (PIECE + 12345,))
        writer = StoreWriter(tmp_path / "w.safetensors", StoreLayout.plan({"a.x": shape}))
        summing = SummingWriter(writer)
        summing.write("a.x", torch.randint(0, 256, shape.shape, dtype=torch.uint8))
        writer.finish()
        reader = StoreReader(tmp_path / "w.safetensors")
        reader.checker = SumChecker(tmp_path, Sums("", summing.sums, {}), "the command")
        loader = WeightLoader(reader, torch.device("cpu"))
        loader.start("a", {"x": shape}).wait()
        flip(reader.path, -1)
        with pytest.raises(DamagedError):
            loader.start("a", {"x": shape}).wait()
        loader.close()
        reader.close()
