"""`export-onnx`: a checkpoint as ONNX files for other tools, beside one file with all weights.

Two layouts. `stages`: every engine stage, as in an engine folder's `stages/`. `monolithic`: the transformer as one
graph (`export.onnx.monolithic`). Both refer to `weights.safetensors`, which is written tensor by tensor, so that memory
use does not depend on the model; it also holds the tables that the runtime uses between stages (`tables.…`). The graphs
compute in the types of the chosen precision, as needed for TensorRT; ONNX Runtime on a CPU has no bf16.
The folder appears when it is complete.
"""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from torch import Tensor

from scail2_rt.engines.build.assemble import EMBEDDING_SOURCE
from scail2_rt.engines.build.onnx_check import check_capability, parser_library
from scail2_rt.engines.folder.store import STORE_NAME, StoreLayout, StoreWriter, TensorShape
from scail2_rt.engines.folder.weights import (
    EMBEDDING,
    StageTensors,
    plan_store,
    planned_tensors,
    runtime_tables,
    write_stage,
)
from scail2_rt.engines.observer import BuildObserver, Phase, SilentObserver
from scail2_rt.engines.registry import check_precision
from scail2_rt.export.models.config import ModelConfig
from scail2_rt.export.models.precision import Precision
from scail2_rt.export.onnx.monolithic import CLIP_TOKENS, TABLES, transformer_model
from scail2_rt.export.onnx.stages import export_stage
from scail2_rt.export.stages.definitions import stage_definitions
from scail2_rt.export.stages.spec import StageDefinition
from scail2_rt.kernels.errors import InputError, Scail2Error

if TYPE_CHECKING:
    from scail2_rt.export.checkpoint.lora import LoRAReport, LoRASpec
    from scail2_rt.export.checkpoint.open import Checkpoint
    from scail2_rt.export.checkpoint.tensors import TensorSource

Layout = Literal["stages", "monolithic"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
TRANSFORMER = "transformer.onnx"
DISK_MARGIN = 1 << 26  # for graphs and file system overhead


@dataclass(frozen=True, slots=True)
class OnnxReport:
    """The result. graphs: file names, in run order; taken_by: the library that accepted the graphs, if checked."""

    directory: str
    layout: Layout
    precision: Precision
    graphs: tuple[str, ...]
    weight_bytes: int
    folder_bytes: int
    wall_s: float
    loras: "tuple[LoRAReport, ...]" = ()
    taken_by: str | None = None


@dataclass(frozen=True, slots=True)
class _Export:
    """The contents of the folder, known before a weight is read."""

    config: ModelConfig
    precision: Precision
    definitions: dict[str, StageDefinition]
    sources: "dict[str, TensorSource]"
    tables: dict[str, Tensor]
    tensors: dict[str, StageTensors]
    layout: StoreLayout


def export_onnx(
    checkpoint: "Checkpoint",
    output: Path,
    layout: str,
    precision: str = "fp32",
    loras: "tuple[LoRASpec, ...]" = (),
    lora_partial: bool = False,
    observer: BuildObserver | None = None,
    check: bool = False,
) -> OnnxReport:
    """Write the graphs and the weights of a checkpoint to the new folder `output`.

    The monolithic layout needs only the transformer of the checkpoint. Raises InputError for an existing output, too
    little disk space, a LoRA that does not fit, or a missing tensor; Scail2Error for a value that the precision cannot
    represent, a full disk, or, with `check`, nodes that a TensorRT library rejects. After an error no files remain."""
    started = time.monotonic()
    if layout not in LAYOUTS:
        raise InputError(f"layout {layout!r} is unknown. Use one of {', '.join(LAYOUTS)}.")
    output = output.expanduser().absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"the output {output} exists and is not an empty folder. Name a new folder with -o.")
    if check:
        parser_library()
    chosen: Layout = "stages" if layout == "stages" else "monolithic"
    export = _plan(checkpoint, chosen, check_precision(precision), loras, lora_partial)
    partial = output.with_name(f".{output.name}.partial")
    try:
        _make_room(partial, export.layout.size)
        _write_weights(export, partial / STORE_NAME, observer or SilentObserver())
        graphs = _write_graphs(export, chosen, partial, observer or SilentObserver())
        taken_by = check_capability(_distinct(export, partial, graphs)) if check else None
        size = sum(file.stat().st_size for file in partial.iterdir())
        os.replace(partial, output)
    except OSError as error:
        raise Scail2Error(f"{output} cannot be written: {error.strerror}. Check space and permissions.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return OnnxReport(
        directory=str(output),
        layout=chosen,
        precision=export.precision,
        graphs=graphs,
        weight_bytes=export.layout.size,
        folder_bytes=size,
        wall_s=time.monotonic() - started,
        loras=getattr(export.sources.get("dit"), "report", ()),
        taken_by=taken_by,
    )


def _distinct(export: _Export, folder: Path, graphs: tuple[str, ...]) -> list[Path]:
    """Return one graph per family: the others have the same nodes."""
    families: dict[str, Path] = {}
    for graph in graphs:
        definition = export.definitions.get(graph.removesuffix(".onnx"))
        families.setdefault(graph if definition is None else definition.family or graph, folder / graph)
    return list(families.values())


def _plan(
    checkpoint: "Checkpoint", layout: Layout, precision: Precision, loras: "tuple[LoRASpec, ...]", lora_partial: bool
) -> _Export:
    sources: dict[str, TensorSource] = {str(name): source for name, source in checkpoint.sources.items()}
    if "dit" not in sources and (loras or layout == "monolithic"):
        raise InputError(f"{checkpoint.path} has no transformer, which this export needs. Use another checkpoint.")
    if loras:
        from scail2_rt.export.checkpoint.lora import apply_loras

        sources["dit"] = apply_loras(sources["dit"], loras, lora_partial)
    config = checkpoint.config
    used = ModelConfig(dit=config.dit) if layout == "monolithic" else config
    definitions = stage_definitions(used)
    tensors = planned_tensors(used, definitions, precision)
    tables = runtime_tables(used, sources.get("dit"))
    if tables:
        tensors[TABLES] = {name: TensorShape(table.dtype, tuple(table.shape)) for name, table in tables.items()}
    return _Export(config, precision, definitions, sources, tables, tensors, plan_store(tensors))


def _make_room(partial: Path, needed: int) -> None:
    """Create the folder to write to. Raises InputError if its disk has too little space."""
    shutil.rmtree(partial, ignore_errors=True)  # left by a call that was killed
    partial.mkdir(parents=True)
    free = shutil.disk_usage(partial).free
    if free < needed + DISK_MARGIN:
        raise InputError(
            f"the export needs {(needed + DISK_MARGIN) / 2**30:.2f} GiB on the disk of {partial.parent}, which has "
            f"{free / 2**30:.2f} GiB free. Free some space or choose another folder with -o."
        )


def _write_weights(export: _Export, path: Path, observer: BuildObserver) -> None:
    phase = Phase(observer, "weights", {name: _bytes(keys) for name, keys in export.tensors.items()})
    writer = StoreWriter(path, export.layout)
    try:
        for name, keys in export.tensors.items():
            step = phase.start(name)
            if name == TABLES:
                for key, table in export.tables.items():
                    writer.write(f"{TABLES}.{key}", table)
            else:
                weights = {"weight": (EMBEDDING_SOURCE,)} if name == EMBEDDING else export.definitions[name].weights
                write_stage(writer, name, keys, weights, export.sources[name.partition(".")[0]], export.precision)
            phase.finish(step)
        writer.finish()
    finally:
        writer.close()


def _bytes(keys: StageTensors) -> int:
    return sum(shape.nbytes for shape in keys.values())


def _write_graphs(export: _Export, layout: Layout, folder: Path, observer: BuildObserver) -> tuple[str, ...]:
    """Write the graphs and return their file names. Each is checked as a file, including its references."""
    import onnx

    if layout == "monolithic" and export.config.dit is not None:
        tokens = CLIP_TOKENS if export.config.clip is None else export.config.clip.tokens
        phase = Phase(observer, "onnx", {TRANSFORMER: _bytes_of(export, "dit")})
        step = phase.start(TRANSFORMER)
        model = transformer_model(
            export.config.dit, lambda definition: definition.numerics(export.precision), export.layout, tokens
        )
        (folder / TRANSFORMER).write_bytes(model.SerializeToString(deterministic=True))
        onnx.checker.check_model(str(folder / TRANSFORMER), full_check=True)
        phase.finish(step)
        return (TRANSFORMER,)
    phase = Phase(observer, "onnx", {name: _bytes(export.tensors[name]) for name in export.definitions})
    for name, definition in export.definitions.items():
        step = phase.start(name)
        export_stage(definition, definition.numerics(export.precision), folder / f"{name}.onnx", export.layout)
        onnx.checker.check_model(str(folder / f"{name}.onnx"))
        phase.finish(step)
    return tuple(f"{name}.onnx" for name in export.definitions)


def _bytes_of(export: _Export, component: str) -> int:
    return sum(_bytes(keys) for name, keys in export.tensors.items() if name.partition(".")[0] in (component, TABLES))
