"""Engine folders through their interface: opening, running, chunking, releasing, and all kinds of mismatches."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from scail2_rt.engines import registry
from scail2_rt.engines.build.build import BuildRequest, build
from scail2_rt.engines.engine_set import EngineSet, Execution, open_engines
from scail2_rt.engines.folder.manifest import MANIFEST, read_manifest
from scail2_rt.engines.row_chunks import RowChunks, piece_size
from scail2_rt.export.checkpoint.open import open_checkpoint
from scail2_rt.export.models.config import ModelConfig
from scail2_rt.export.models.precision import FP32, PRECISIONS
from scail2_rt.export.stages.definitions import stage_definitions
from scail2_rt.export.stages.spec import ROWS, TensorSpec
from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.kernels.rows.ops import layer_norm
from tests.support.small import DIT, UMT5, small_checkpoint

C = DIT.dim


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("engines") / "e"
    build(BuildRequest(Path("small"), directory, ("torch",), "fp32"), small_checkpoint())
    return directory


@pytest.fixture
def engines(folder: Path) -> Iterator[EngineSet]:
    with open_engines(folder, "torch", device="cpu") as opened:
        yield opened


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    import shutil

    return shutil.copytree(folder, tmp_path / "copy")


def inputs_of(engines: EngineSet, stage: str, rows: int) -> list[torch.Tensor]:
    torch.manual_seed(rows)
    specs = engines.definitions[stage].io(engines.numerics(stage))[0]
    return [torch.randn([rows if isinstance(d, str) else d for d in s.dims]).to(s.dtype) for s in specs]


def test_fp16_is_computed_in_fp32_on_a_cpu(tmp_path: Path) -> None:
    """PyTorch's fp16 on a CPU is too slow, so fp32 is used; the stored values are those of the folder."""
    build(BuildRequest(Path("small"), tmp_path / "e", ("torch",), "fp16"), small_checkpoint())
    with open_engines(tmp_path / "e", "torch", device="cpu") as opened:
        numerics = opened.numerics("dit.blocks.0.qkv")
        assert (numerics.storage, numerics.compute) == (torch.float16, torch.float32)
        x, mod = inputs_of(opened, "dit.blocks.0.qkv", 5)
        assert opened.run("dit.blocks.0.qkv", x, mod)[0].dtype == torch.float32
        assert opened.store.get("dit.blocks.0.qkv.linear.weight").dtype == torch.float16


def test_a_stage_computes_what_the_checkpoint_says(engines: EngineSet) -> None:
    source = small_checkpoint().sources["dit"]
    x, mod = inputs_of(engines, "dit.blocks.1.qkv", 9)
    (qkv,) = engines.run("dit.blocks.1.qkv", x, mod)
    h = layer_norm(x, 1e-6) * (1 + mod[1]) + mod[0]
    parts = [
        h @ source.get(f"blocks.1.self_attn.{p}.weight").T + source.get(f"blocks.1.self_attn.{p}.bias") for p in "qkv"
    ]
    torch.testing.assert_close(qkv, torch.cat(parts, 1))


def test_tables_hold_what_the_runtime_needs(engines: EngineSet) -> None:
    source = small_checkpoint().sources["dit"]
    assert torch.equal(engines.tables["blocks.1.modulation"], source.get("blocks.1.modulation")[0])
    assert torch.equal(engines.tables["blocks.0.norm_k"], source.get("blocks.0.self_attn.norm_k.weight"))
    assert engines.tables["head.modulation"].shape == (2, C)
    assert len(engines.tables) == 3 * DIT.layers + 1


@pytest.mark.parametrize("rows", [17, 64, 101])
def test_row_chunks_change_nothing(engines: EngineSet, rows: int) -> None:
    """Odd row counts, every stage with a row axis; 1e-6 relative in fp32."""
    cut = 0
    for stage, definition in engines.definitions.items():
        if all(spec.row_axis is None for spec in definition.io(engines.numerics(stage))[0]):
            continue
        inputs = inputs_of(engines, stage, rows)
        engines.max_rows = rows
        whole = engines.run(stage, *inputs)
        engines.max_rows = 16
        for one, other in zip(whole, engines.run(stage, *inputs), strict=True):
            assert one.shape == other.shape
            assert (one - other).norm() <= 1e-6 * one.norm()
        cut += 1
    assert cut == 3 + 3 * DIT.layers  # embed, time, head; qkv, mid, ffn per block


@pytest.mark.parametrize(("rows", "limit", "expected"), [(10, 10, (1, 10)), (11, 10, (2, 6)), (101, 16, (7, 15))])
def test_pieces_are_few_and_equal(rows: int, limit: int, expected: tuple[int, int]) -> None:
    assert piece_size(rows, limit) == expected


def test_every_piece_has_rows() -> None:
    for limit in range(1, 12):
        for rows in range(1, 60):
            count, size = piece_size(rows, limit)
            assert size <= limit
            assert (count - 1) * size < rows <= count * size


def test_chunks_use_static_buffers_and_repeat_the_last_row() -> None:
    seen: list[torch.Tensor] = []
    addresses: list[tuple[int, ...]] = []

    def call(x: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen.append(x.clone())
        addresses.append((x.data_ptr(), table.data_ptr()))
        return (x * 2,)

    specs = (
        (TensorSpec("x", torch.float32, (ROWS, 1)), TensorSpec("t", torch.float32, (3,))),
        (TensorSpec("y", torch.float32, (ROWS, 1)),),
    )
    chunks = RowChunks(4)
    x, table = torch.arange(10.0)[:, None], torch.zeros(3)
    (y,) = chunks.run(call, "f", specs, (x, table))
    assert torch.equal(y, x * 2)
    assert [part.flatten().tolist() for part in seen] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 9, 9]]
    chunks.run(call, "f", specs, (x + 1, table))
    assert len(set(addresses)) == 1
    before = x.data_ptr()
    chunks.run(call, "f", specs, (x[:4], table))
    assert addresses[-1][0] == before  # tensors that fit are not copied
    chunks.keep({"f"})
    chunks.run(call, "f", specs, (x, table))
    assert addresses[-1] == addresses[0]


def test_chunks_refuse_what_cannot_be_cut() -> None:
    specs = ((TensorSpec("x", torch.float32, (ROWS,)),), (TensorSpec("y", torch.float32, (1,)),))
    with pytest.raises(Scail2Error, match="no row axis"):
        RowChunks(2).run(lambda x: (x.sum()[None],), "f", specs, (torch.ones(3),))
    two = ((specs[0][0], specs[0][0]), specs[0])
    with pytest.raises(Scail2Error, match=r"different row counts: \[2, 3\]"):
        RowChunks(2).run(lambda x, y: (x,), "f", two, (torch.ones(3), torch.ones(2)))
    with pytest.raises(ValueError, match="at least 1"):
        RowChunks(0)


def test_stages_load_when_run_and_go_when_released(engines: EngineSet) -> None:
    assert engines.loaded == ()
    x, mod = inputs_of(engines, "dit.blocks.0.qkv", 3)
    engines.run("dit.blocks.0.qkv", x, mod)
    engines.run("dit.head", x, mod[:2])
    engine, _ = engines.executor._engines["dit.blocks.0.qkv"]
    engines.release("dit.blocks.")
    assert engines.loaded == ("dit.head",)
    with pytest.raises(ValueError, match="closed"):
        engine(x, mod)
    engines.run("dit.blocks.0.qkv", x, mod)
    assert set(engines.loaded) == {"dit.head", "dit.blocks.0.qkv"}


def test_inputs_of_the_wrong_type_are_named(engines: EngineSet) -> None:
    x, mod = inputs_of(engines, "dit.head", 3)
    with pytest.raises(Scail2Error, match=r"dit\.head needs inputs of types"):
        engines.run("dit.head", x.half(), mod)
    with pytest.raises(Scail2Error, match=r"dit\.head needs inputs of types"):
        engines.run("dit.head", x)


def test_what_the_folder_lacks_is_named(engines: EngineSet) -> None:
    with pytest.raises(InputError, match=r"has no stage vae\.decode_first.*has no vae part"):
        engines.run("vae.decode_first", torch.zeros(1))
    with pytest.raises(InputError, match=r"no tokenizer/tokenizer\.json"):
        _ = engines.tokenizer_path


def test_embedding_rows(engines: EngineSet) -> None:
    table = small_checkpoint().sources["umt5"].get("token_embedding.weight")
    ids = torch.tensor([3, 3, UMT5.vocab - 1])
    assert torch.equal(engines.embedding_rows(ids), table[ids])


def test_the_encoder_hash_follows_the_encoder(engines: EngineSet, tmp_path: Path) -> None:
    def hash_with(name: str, precision: str, seed: int) -> str:
        build(BuildRequest(Path("small"), tmp_path / name, ("torch",), precision), small_checkpoint(seed))
        with open_engines(tmp_path / name, "torch") as opened:
            return opened.encoder_hash

    assert hash_with("same", "fp32", 0) == engines.encoder_hash
    assert hash_with("weights", "fp32", 1) != engines.encoder_hash
    assert hash_with("types", "bf16", 0) != engines.encoder_hash


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_runs(tmp_path: Path, precision: str) -> None:
    """Against fp32: within the rounding of the storage type, and not exactly equal (so the type is really used)."""
    bound = {"fp32": 0.0, "bf16": 0.02, "fp16": 0.003, "fp8": 0.1}[precision]
    build(BuildRequest(Path("small"), tmp_path / "p", ("torch",), precision), small_checkpoint())
    build(BuildRequest(Path("small"), tmp_path / "r", ("torch",), "fp32"), small_checkpoint())
    with open_engines(tmp_path / "p", "torch") as tried, open_engines(tmp_path / "r", "torch") as reference:
        for stage in ("dit.blocks.0.qkv", "dit.blocks.0.ffn", "dit.context", "umt5.layers.0"):
            inputs = inputs_of(reference, stage, 11)
            if stage.startswith("umt5"):
                inputs = [inputs[0], torch.zeros(11, 11, dtype=torch.int64), torch.ones(11)]
            types = [spec.dtype for spec in tried.definitions[stage].io(tried.numerics(stage))[0]]
            want = reference.run(stage, *inputs)[0]
            have = tried.run(stage, *(x.to(t) for x, t in zip(inputs, types, strict=True)))[0]
            error = float((have.float() - want).norm() / want.norm())
            assert error <= (0.02 if precision == "fp16" and stage.startswith("umt5") else bound), stage
            assert (error > 0) == (precision != "fp32"), stage


def test_compute_dtype_depends_on_precision_and_stage(tmp_path: Path) -> None:
    build(BuildRequest(Path("small"), tmp_path / "p", ("torch",), "fp8"), small_checkpoint())
    with open_engines(tmp_path / "p", "torch") as engines:
        assert engines.compute_dtype("dit.blocks.0.qkv") == torch.bfloat16
        assert engines.compute_dtype("dit.head") == torch.float32
        weight = engines.store.get("dit.blocks.0.qkv.linear.weight")
        assert weight.dtype == torch.float8_e4m3fn


def edit(folder: Path, **fields: object) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format_version": 99}, r"field format_version is 99, this version of scail2-rt needs 1.*--rebuild"),
        ({"precision": "int4"}, r"field precision is 'int4'.*--rebuild"),
        ({"sources": None}, r"damaged.*--rebuild"),
        ({"stages": [{"name": "x"}]}, r"field 'inputs' is missing.*--rebuild"),
        ({"model": {"dit": {"dimension": 3}}}, r"damaged.*--rebuild"),
    ],
)
def test_a_damaged_manifest_names_the_field(copy: Path, fields: dict[str, object], message: str) -> None:
    edit(copy, **fields)
    with pytest.raises(InputError, match=message):
        open_engines(copy)


def test_a_manifest_that_is_no_json_is_refused(copy: Path) -> None:
    (copy / MANIFEST).write_text("{")
    with pytest.raises(InputError, match=r"cannot be read.*--rebuild"):
        open_engines(copy)
    (copy / MANIFEST).write_text("[]")
    with pytest.raises(InputError, match=r"format_version is None"):
        open_engines(copy)
    (copy / MANIFEST).unlink()
    with pytest.raises(InputError, match=r"not a finished engine folder.*scail2-rt build-engines"):
        open_engines(copy)


def test_a_changed_file_is_named_with_both_sizes(copy: Path) -> None:
    store = copy / "stages" / "weights.safetensors"
    size = store.stat().st_size
    with store.open("ab") as file:
        file.write(b"x")
    with pytest.raises(
        InputError, match=rf"stages/weights\.safetensors.*{size} bytes, the file has {size + 1}.*--rebuild"
    ):
        open_engines(copy)
    store.unlink()
    with pytest.raises(InputError, match=r"weights\.safetensors.*the file is missing.*--precision fp32 .*--rebuild"):
        open_engines(copy)


def test_a_stage_of_another_version_is_named(copy: Path) -> None:
    document = json.loads((copy / MANIFEST).read_text())
    stages = document["stages"]
    head = next(stage for stage in stages if stage["name"] == "dit.head")
    edit(copy, stages=[stage for stage in stages if stage is not head])
    with pytest.raises(InputError, match=r"dit\.head is missing from the manifest"):
        open_engines(copy)
    edit(copy, stages=[*stages, head | {"name": "dit.tail"}])
    with pytest.raises(InputError, match=r"dit\.tail is unknown to this version"):
        open_engines(copy)
    head["outputs"][0]["dtype"] = "float16"
    edit(copy, stages=stages)
    with pytest.raises(InputError, match=r"outputs of stage dit\.head: .*out float16.*needs out float32"):
        open_engines(copy)


def test_a_store_of_another_version_is_refused_when_a_stage_loads(copy: Path) -> None:
    from scail2_rt.engines.folder.store import StoreLayout, StoreReader, StoreWriter, TensorShape

    path = copy / "stages" / "weights.safetensors"
    layout = StoreReader(path).layout
    shapes = {name: TensorShape(layout.location(name).dtype, layout.location(name).shape) for name in layout.names}
    shapes["dit.head.linear.bias"] = TensorShape(torch.float16, (64,))
    StoreWriter(path, StoreLayout.plan(shapes)).finish()
    document = json.loads((copy / MANIFEST).read_text())
    for artefact in document["artefacts"]:
        artefact["size"] = (copy / artefact["path"]).stat().st_size
    edit(copy, artefacts=document["artefacts"], sums=None)
    with (
        open_engines(copy, "torch") as engines,
        pytest.raises(InputError, match=r"dit\.head\.linear\.bias as torch.float16"),
    ):
        engines.run("dit.head", torch.zeros(2, C), torch.zeros(2, C))


def test_a_backend_that_is_not_in_the_folder_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"no onnxruntime engines \(it holds torch\).*--backend onnxruntime"):
        open_engines(folder, "onnxruntime")
    with pytest.raises(InputError, match="'tpu' is unknown"):
        open_engines(folder, "tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="no CUDA GPU"):
        open_engines(folder, "torch", device="cuda")


def test_the_manifest_survives_a_round_trip(folder: Path, tmp_path: Path) -> None:
    from scail2_rt.engines.folder.manifest import write_manifest

    manifest = read_manifest(folder)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert manifest.config.dit == DIT
    assert manifest.backends == ("torch",)
    assert manifest.executors[0].versions == {"torch": torch.__version__}


class TestBackends:
    """The properties of a backend before opening, and the description of an executor."""

    @pytest.mark.parametrize("name", registry.BACKENDS)
    def test_each_is_what_the_table_says(self, name: str) -> None:
        backend = registry.backend(name)
        assert (backend.name, backend.module) == (name, name.replace("-", "_"))
        assert backend.install.startswith("pip install")
        assert backend.numerics(stage_definitions(ModelConfig(dit=DIT))["dit.head"], "fp8", "cpu") == FP32

    def test_where_a_memory_limit_can_be_kept(self, folder: Path) -> None:
        obstacles = {name: registry.backend(name).limit_obstacle("cuda") for name in registry.BACKENDS}
        assert obstacles == {
            "tensorrt": "plans include their weights",
            "tensorrt-rtx": "plans include their weights",
            "torch": None,
            "onnxruntime": "onnxruntime runs on the cuda here",
        }
        with pytest.raises(InputError, match=r"needs the torch backend on a GPU, but torch runs on the cpu here"):
            open_engines(folder, "torch", Execution(vram_limit=1 << 30), device="cpu")

    def test_on_a_cpu_no_weights_are_placed_and_no_steps_recorded(self, engines: EngineSet) -> None:
        assert not engines.places_weights
        assert not engines.cuda_graphs
        assert engines.streamed == ()
        engines.stream([])

    def test_weights_are_streamed_by_who_can(self, engines: EngineSet) -> None:
        executor = registry.backend("onnxruntime").open(engines.executor.folder, engines.device, Execution())
        executor.stream([])
        with pytest.raises(Scail2Error, match="onnxruntime cannot stream weights"):
            executor.stream(["dit.head"])

    def test_a_folder_without_a_transformer_has_no_attention(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        checkpoint = open_checkpoint(tiny_checkpoint, components=("umt5",))
        build(BuildRequest(tiny_checkpoint, tmp_path / "e", ("torch",), "fp32"), checkpoint)
        with open_engines(tmp_path / "e", "torch", device="cpu") as opened:
            assert opened.attention.name == "none"
            assert "the folder has no transformer" in opened.choice


class TestChoice:
    """`auto` on machines that differ in GPU and libraries."""

    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.libraries = {"torch", "onnxruntime"}
        self.graphics: str | None = None
        monkeypatch.setattr(registry, "installed", lambda name: name in self.libraries)
        monkeypatch.setattr(registry, "gpu", lambda: self.graphics)

    def test_onnxruntime_on_a_cpu(self) -> None:
        assert registry.choose_backend() == ("onnxruntime", "this machine has no CUDA GPU")
        assert registry.choose_backend("auto", ["torch"])[0] == "torch"
        assert "not built into the folder" in registry.choose_backend("auto", ["torch"])[1]

    def test_torch_when_onnxruntime_is_not_installed(self) -> None:
        self.libraries = {"torch"}
        name, reason = registry.choose_backend()
        assert name == "torch"
        assert "onnxruntime is not installed" in reason

    def test_torch_on_a_gpu(self) -> None:
        self.graphics = "Some GPU (sm90)"
        name, reason = registry.choose_backend()
        assert name == "torch"
        assert "Some GPU" in reason
        assert registry.choose_backend("auto", ["onnxruntime"])[0] == "onnxruntime"

    def test_tensorrt_only_with_library_and_plans(self) -> None:
        self.graphics = "Some GPU (sm90)"
        assert registry.choose_backend("auto", ["torch", "tensorrt"])[0] == "torch"
        self.libraries.add("tensorrt")
        assert registry.choose_backend("auto", ["torch", "tensorrt"])[0] == "tensorrt"
        assert registry.choose_backend("auto", ["torch"])[0] == "torch"
        assert registry.choose_backend("auto")[0] == "torch"  # a build: no plans yet

    def test_a_named_backend_is_never_replaced(self) -> None:
        self.libraries = {"torch"}
        with pytest.raises(InputError, match=r"onnxruntime is not installed.*pip install"):
            registry.choose_backend("onnxruntime")

    def test_nothing_that_can_run(self) -> None:
        with pytest.raises(InputError, match="none of the backends"):
            registry.choose_backend("auto", ["tensorrt"])
