"""Checksums: independent of how data is split, sensitive to one flipped bit; and folders without checksums."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from xxhash import xxh3_64_digest, xxh3_64_hexdigest

from scail2_rt.engines.build.build import build
from scail2_rt.engines.engine_set import EngineSet, open_engines
from scail2_rt.engines.folder import sums as module
from scail2_rt.engines.folder.damage import check_health, find_damage, sums_now
from scail2_rt.engines.folder.manifest import MANIFEST, read_manifest
from scail2_rt.engines.folder.store import StoreLayout, StoreReader, StoreWriter, SummingWriter
from scail2_rt.engines.folder.sums import PIECE, DamagedError, RunningSum, joined, sum_of, sum_of_file
from tests.engines.folder.test_store import SHAPES, values
from tests.support.damage import STORE, flip, flip_tensor
from tests.support.small import build_small, request, small_checkpoint

UP = "dit.blocks.1.ffn.up.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sums") / "e"
    build_small(folder)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "e")


def without_sums(folder: Path) -> Path:
    """A folder as written by a version without checksums."""
    document = json.loads((folder / MANIFEST).read_text())
    del document["sums"]
    (folder / MANIFEST).write_text(json.dumps(document))
    return folder


class TestSums:
    def test_the_definition(self) -> None:
        data = bytes(range(256)) * (PIECE // 256) + b"and more"
        expected = xxh3_64_hexdigest(xxh3_64_digest(data[:PIECE]) + xxh3_64_digest(data[PIECE:]))
        assert sum_of(data) == expected
        assert sum_of(b"") == joined([]) == xxh3_64_hexdigest(b"")

    def test_parts_do_not_matter(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "PIECE", 10)
        data = bytes(range(95))
        for size in (1, 9, 10, 11, 50, 95):
            running = RunningSum()
            for start in range(0, len(data), size):
                running.add(memoryview(data)[start : start + size])
            assert running.hex == sum_of(data)
        (tmp_path / "f").write_bytes(data)
        assert sum_of_file(tmp_path / "f") == sum_of(data)
        assert sum_of(data[:90]) != sum_of(data)

    def test_what_is_read_sums_to_what_was_written(self, tmp_path: Path) -> None:
        writer = StoreWriter(tmp_path / "s", StoreLayout.plan(SHAPES))
        summing = SummingWriter(writer)
        for name, tensor in values().items():
            flat = tensor.reshape(-1)
            summing.write(name, flat[:2])
            if len(flat) > 2:
                summing.write(name, flat[2:], 2)
        writer.finish()
        reader = StoreReader(tmp_path / "s")
        assert summing.sums == {name: joined(reader.pieces(name)) for name in SHAPES}
        with pytest.raises(ValueError, match="out of order"):
            summing.write("b.table", torch.zeros(3, dtype=torch.float16), 3)


class TestManifest:
    def test_has_a_sum_of_everything(self, whole: Path) -> None:
        manifest = read_manifest(whole)
        assert manifest.sums is not None
        assert set(manifest.sums.tensors) == set(StoreReader(whole / STORE).layout.names)
        assert set(manifest.sums.files) == {a.path for a in manifest.artefacts} - {STORE}
        assert sums_now(whole, manifest.sums.files) == manifest.sums

    def test_sums_of_another_kind_are_none(self, copy: Path) -> None:
        text = (copy / MANIFEST).read_text()
        (copy / MANIFEST).write_text(text.replace(module.KIND, "crc32"))
        assert read_manifest(copy).sums is None
        assert build(request(copy), small_checkpoint()).sums_added

    def test_a_folder_without_sums_opens_with_one_sentence(self, copy: Path) -> None:
        with open_engines(without_sums(copy), "torch", device="cpu") as engines:
            assert run(engines) is not None
            (sentence,) = engines.warnings
        assert "has no checksums" in sentence
        assert f"build-engines small -o {copy} --precision fp32 --backend torch" in sentence
        flip_tensor(copy, UP)
        with open_engines(copy, "torch", device="cpu") as engines:
            run(engines)


def run(engines: EngineSet, stage: str = "dit.blocks.1.ffn") -> object:
    inputs = engines.definitions[stage].io(engines.numerics(stage))[0]
    shapes = [[3 if isinstance(d, str) else d for d in spec.dims] for spec in inputs]
    return engines.run(stage, *(torch.randn(shape).to(spec.dtype) for shape, spec in zip(shapes, inputs, strict=True)))


class TestOneBit:
    def test_its_stage_is_refused_when_it_is_loaded(self, copy: Path) -> None:
        flip_tensor(copy, UP)
        with open_engines(copy, "torch", device="cpu") as engines:
            run(engines, "dit.blocks.0.ffn")
            for _ in range(2):
                with pytest.raises(DamagedError) as caught:
                    run(engines)
        assert str(caught.value) == (
            f"stage dit.blocks.1.ffn of {copy} is damaged: tensor {UP} does not match its checksum. "
            f"Repair only this stage with: scail2-rt build-engines small -o {copy} --precision fp32 --backend torch"
        )

    def test_a_stage_is_checked_once(self, copy: Path) -> None:
        with open_engines(copy, "torch", device="cpu") as engines:
            run(engines)
            flip_tensor(copy, UP)
            engines.release("dit.")
            run(engines)

    def test_the_embedding_when_its_rows_are_read(self, copy: Path) -> None:
        flip_tensor(copy, "umt5.token_embedding.weight")
        with open_engines(copy, "torch", device="cpu") as engines:
            run(engines)
            with pytest.raises(DamagedError, match=r"stage umt5\.token_embedding"):
                engines.embedding_rows(torch.tensor([3]))

    @pytest.mark.parametrize("place", [1, 9, 100, -1])
    def test_the_header_when_the_folder_is_opened(self, copy: Path, place: int) -> None:
        header = len(StoreReader(copy / STORE).layout.header)
        flip(copy / STORE, place % header)
        with pytest.raises(DamagedError, match="the header of the weight store does not match its checksum"):
            open_engines(copy, "torch", device="cpu")

    def test_tables_when_the_folder_is_opened(self, copy: Path) -> None:
        flip(copy / "tables.safetensors", -3)
        with pytest.raises(DamagedError, match=r"file tables\.safetensors does not match its checksum"):
            open_engines(copy, "torch", device="cpu")

    def test_a_graph_and_weights_before_onnxruntime_maps_them(self, tmp_path: Path) -> None:
        pytest.importorskip("onnxruntime")
        folder = tmp_path / "e"
        build(replace(request(folder), backends=("onnxruntime",)), small_checkpoint())
        for damage, part in ((lambda: flip_tensor(folder, UP), UP), (lambda: flip(folder / GRAPH, 20), GRAPH)):
            damage()
            with open_engines(folder, "onnxruntime", device="cpu") as engines, pytest.raises(DamagedError, match=part):
                run(engines)
            report = build(replace(request(folder), backends=("onnxruntime",)), small_checkpoint())
            assert report.repaired == ("dit.blocks.1.ffn",)
        with open_engines(folder, "onnxruntime", device="cpu") as engines:
            run(engines)

    def test_a_check_of_the_folder_finds_all_of_it(self, copy: Path) -> None:
        manifest = read_manifest(copy)
        assert manifest.sums is not None
        assert find_damage(copy, manifest, manifest.sums) == ()
        health = check_health(copy, manifest)
        assert health.text == f"{health.parts} tensors and files have the checksums recorded by the build"
        flip_tensor(copy, UP)
        assert "stage dit.blocks.1.ffn of" in check_health(copy, manifest).text
        flip_tensor(copy, "dit.blocks.1.ffn.down.weight")
        flip(copy / "tables.safetensors", -3)
        text = check_health(copy, manifest).text
        assert "is damaged: stage dit.blocks.1.ffn (tensor dit.blocks.1.ffn." in text
        assert "and 1 more), file tables.safetensors. Repair only this with: scail2-rt build-engines small" in text

    def test_what_cannot_be_read_is_damaged(self, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        read = StoreReader.read_into

        def fail(self: StoreReader, name: str, start: int, target: memoryview) -> None:
            if name == UP:
                raise OSError(5, "Input/output error")
            read(self, name, start, target)

        monkeypatch.setattr(StoreReader, "read_into", fail)
        assert f"tensor {UP}, which cannot be read, does" in check_health(copy, read_manifest(copy)).text


GRAPH = "stages/dit.blocks.1.ffn.onnx"
