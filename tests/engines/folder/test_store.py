"""The weight store: format, places, resumption, and reading without copies."""

from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from scail2_rt.engines.folder.store import PAGE, StoreLayout, StoreReader, StoreWriter, TensorShape
from scail2_rt.kernels.errors import InputError

SHAPES = {
    "a.weight": TensorShape(torch.float8_e4m3fn, (3, 5)),
    "a.scale": TensorShape(torch.float32, (3,)),
    "a.bias": TensorShape(torch.bfloat16, (3,)),
    "b.table": TensorShape(torch.float16, (7, 1, 2)),
    "b.one": TensorShape(torch.float32, ()),
    "b.ids": TensorShape(torch.int64, (3,)),
}


def values() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: (torch.randn(shape) * 9).to(dtype) for name, (dtype, shape) in SHAPES.items()}


def written(path: Path) -> Path:
    writer = StoreWriter(path, StoreLayout.plan(SHAPES))
    for name, tensor in values().items():
        writer.write(name, tensor)
    writer.finish()
    return path


def test_the_safetensors_library_reads_the_store(tmp_path: Path) -> None:
    with safetensors.safe_open(written(tmp_path / "s.safetensors"), "pt") as file:
        assert set(file.keys()) == set(SHAPES)
        for name, tensor in values().items():
            found = file.get_tensor(name)
            assert found.dtype == tensor.dtype
            assert found.shape == tensor.shape
            assert torch.equal(found.float(), tensor.float())


def test_places_are_aligned_and_leave_no_holes() -> None:
    layout = StoreLayout.plan(SHAPES)
    assert len(layout.header) % PAGE == 0
    end = len(layout.header)
    for name in layout.names:
        offset, length, dtype, shape = layout.location(name)
        assert offset == end
        assert offset % dtype.itemsize == 0
        assert (dtype, shape) == SHAPES[name]
        end += length
    assert end == layout.size
    assert layout.stage_bytes("a") == 15 + 12 + 6


def test_read_gives_the_planned_layout(tmp_path: Path) -> None:
    planned, found = StoreLayout.plan(SHAPES), StoreLayout.read(written(tmp_path / "s.safetensors"))
    assert found.names == planned.names
    assert all(found.location(name) == planned.location(name) for name in SHAPES)


def test_reading_copies_nothing(tmp_path: Path) -> None:
    reader = StoreReader(written(tmp_path / "s.safetensors"))
    one, other = reader.get("a.weight"), reader.get("b.ids")
    distance = reader.layout.location("a.weight").offset - reader.layout.location("b.ids").offset
    assert one.data_ptr() - other.data_ptr() == distance
    assert one.data_ptr() == reader.get("a.weight").data_ptr()
    assert torch.equal(reader.stage("b", ["ids", "table"])["table"], values()["b.table"])
    with pytest.raises(InputError, match=r"no tensor a\.nothing"):
        reader.get("a.nothing")
    reader.close()
    assert torch.equal(other, values()["b.ids"])  # a tensor that is still used keeps the mapping
    with pytest.raises(ValueError, match="closed"):
        reader.get("b.ids")


def test_pieces_land_at_their_elements(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "s", StoreLayout.plan(SHAPES))
    whole = values()["b.table"]
    writer.write("b.table", whole.flatten()[:9])
    writer.write("b.table", whole.flatten()[9:], start=9)
    writer.finish()
    assert torch.equal(StoreReader(tmp_path / "s").get("b.table"), whole)


@pytest.mark.parametrize(
    ("name", "data", "start"),
    [("a.bias", torch.zeros(3), 0), ("a.scale", torch.zeros(4), 0), ("a.scale", torch.zeros(2), 2)],
)
def test_a_tensor_that_does_not_fit_is_refused(tmp_path: Path, name: str, data: torch.Tensor, start: int) -> None:
    writer = StoreWriter(tmp_path / "s", StoreLayout.plan(SHAPES))
    with pytest.raises(ValueError, match="does not fit"):
        writer.write(name, data, start)
    writer.close()


def test_a_partial_file_is_continued_only_with_the_same_layout(tmp_path: Path) -> None:
    path = tmp_path / "s"
    writer = StoreWriter(path, StoreLayout.plan(SHAPES))
    assert not writer.resumed
    writer.write("b.ids", values()["b.ids"])
    writer.close()
    again = StoreWriter(path, StoreLayout.plan(SHAPES))
    assert again.resumed
    again.finish()
    assert torch.equal(StoreReader(path).get("b.ids"), values()["b.ids"])
    StoreWriter(path, StoreLayout.plan(SHAPES)).close()
    other = StoreWriter(path, StoreLayout.plan(SHAPES | {"c": TensorShape(torch.float32, (1,))}))
    assert not other.resumed
    other.finish()
    assert not StoreReader(path).get("b.ids").any()


def test_files_of_other_writers_can_be_read(tmp_path: Path) -> None:
    save_file({"x": torch.arange(6.0).view(2, 3)}, tmp_path / "f")
    assert StoreReader(tmp_path / "f").get("x")[1, 2] == 5


@pytest.mark.parametrize("damage", ["cut", "longer", "garbage", "empty", "huge header", "not an object", "missing"])
def test_a_damaged_store_is_refused(tmp_path: Path, damage: str) -> None:
    path = written(tmp_path / "s")
    whole = path.read_bytes()
    broken = {
        "cut": whole[:-1],
        "longer": whole + b"x",
        "garbage": whole[:8] + b"\xff" * (len(whole) - 8),
        "empty": b"",
        "huge header": b"\xff" * 8 + whole[8:],
        "not an object": (2).to_bytes(8, "little") + b"[]",
    }
    path.unlink()
    if damage in broken:
        path.write_bytes(broken[damage])
    with pytest.raises(InputError, match="Rebuild the engine folder"):
        StoreLayout.read(path)
