"""From checkpoint tensors to the store: the tensors of each stage, and the conversion of their values.

Names, shapes and types come from the stage's module on the meta device. A value is the concatenation of checkpoint
tensors along dimension 0, converted from their type through fp32; e4m3 weights get one scale per output channel.
Everything is done in pieces of at most 64 MiB, so that a build's memory use does not depend on the size of the model.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scail2_rt.engines.folder.store import StoreLayout, TensorShape, TensorWriter
from scail2_rt.export.checkpoint.row_chunks import row_ranges
from scail2_rt.export.models.config import ModelConfig
from scail2_rt.export.models.precision import Precision, numerics_of
from scail2_rt.export.stages.dit import table_sources
from scail2_rt.export.stages.spec import StageDefinition
from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.kernels.rows.ops import E4M3, quantise_columns

if TYPE_CHECKING:
    from scail2_rt.export.checkpoint.tensors import TensorSource

EMBEDDING = "umt5.token_embedding"
PIECE = 1 << 24  # elements converted at a time

StageTensors = dict[str, TensorShape]  # parameter name → type and shape


def planned_tensors(
    config: ModelConfig, definitions: Mapping[str, StageDefinition], precision: Precision
) -> dict[str, StageTensors]:
    """Return stage name → its parameters, in stage order. The umT5 token embedding is stored as a separate stage."""
    plan: dict[str, StageTensors] = {}
    if config.umt5 is not None:
        storage = numerics_of(EMBEDDING, precision).storage
        plan[EMBEDDING] = {"weight": TensorShape(storage, (config.umt5.vocab, config.umt5.dim))}
    for name, definition in definitions.items():
        with torch.device("meta"):
            module = definition.build(definition.numerics(precision))
        state = module.state_dict()
        plan[name] = {key: TensorShape(value.dtype, tuple(value.shape)) for key, value in state.items()}
        fed = set(definition.weights) | {
            _scale_of(key) for key in definition.weights if key in state and state[key].dtype == E4M3
        }
        if fed != set(state):
            raise Scail2Error(f"stage {name}: its definition feeds {sorted(fed ^ set(state))} wrongly.")
    return plan


def plan_store(plan: Mapping[str, StageTensors]) -> StoreLayout:
    """Return the layout of the store for these stages."""
    return StoreLayout.plan({f"{stage}.{key}": shape for stage, keys in plan.items() for key, shape in keys.items()})


def _scale_of(parameter: str) -> str:
    return parameter.removesuffix("weight") + "scale"


def write_stage(
    writer: TensorWriter,
    stage: str,
    tensors: StageTensors,
    weights: Mapping[str, Sequence[str]],
    source: "TensorSource",
    precision: Precision,
) -> None:
    """Convert and write every parameter of a stage. Raises InputError for a tensor that is missing, of a wrong shape or
    not finite; Scail2Error for a value that the storage type cannot represent."""
    for parameter, names in weights.items():
        target = tensors[parameter]
        _check_shapes(stage, parameter, target, names, source)
        position = 0
        for name, values in pieces(source, names, target.shape[-1] if target.dtype == E4M3 else 1):
            extremes = finite_extremes(name, values, source)
            if target.dtype == E4M3:
                data, scale = quantise_columns(values.view(-1, target.shape[-1]))
                writer.write(f"{stage}.{_scale_of(parameter)}", scale, position // target.shape[-1])
            else:
                if not extremes.to(target.dtype).isfinite().all():
                    raise Scail2Error(_overflow(stage, name, extremes, target.dtype, precision) + _fused(name, source))
                data = values.to(target.dtype)
            writer.write(f"{stage}.{parameter}", data, position)
            position += values.numel()


def finite_extremes(name: str, values: Tensor, source: "TensorSource | None" = None) -> Tensor:
    """Return the smallest and the largest value, [2]. Raises InputError if a value is not finite; `source`: origin of
    the tensor, which may name the LoRAs that caused it."""
    extremes = torch.stack(values.aminmax())  # NaN if any is; much faster than isfinite on every value
    if extremes.isfinite().all():
        return extremes
    if loras := _loras(name, source):
        raise InputError(
            f"tensor {name} has NaN or infinite values once the LoRA is fused into it: {loras}. Use a smaller strength."
        )
    raise InputError(f"tensor {name} of the checkpoint has NaN or infinite values. Get an intact file.")


def _loras(name: str, source: "TensorSource | None") -> str:
    """Return the LoRAs that changed a tensor, in words; empty if none did."""
    fused_into = getattr(source, "fused_into", None)  # exists if LoRAs are fused into the source
    return " and ".join(map(str, fused_into(name))) if fused_into is not None else ""


def _fused(name: str, source: "TensorSource") -> str:
    loras = _loras(name, source)
    return f" It holds the LoRA {loras}." if loras else ""


def pieces(source: "TensorSource", names: Sequence[str], multiple: int = 1) -> Iterator[tuple[str, Tensor]]:
    """Yield (source name, at most PIECE values as flat fp32), in complete rows of `multiple` elements."""
    size = max(PIECE // multiple, 1) * multiple
    for name in names:
        shape = source.shape(name)
        if math.prod(shape) <= size:
            yield name, source.get(name).reshape(-1).float()
            continue
        for start, stop in row_ranges(shape, PIECE):  # a quantised source dequantises only these rows
            for piece in source.rows(name, start, stop).reshape(-1).split(size):
                yield name, piece.float()


def _check_shapes(
    stage: str, parameter: str, target: TensorShape, names: Sequence[str], source: "TensorSource"
) -> None:
    known = set(source.keys())
    missing = [name for name in names if name not in known]
    if missing:
        raise InputError(
            f"the checkpoint has no tensor {', '.join(missing)}, which stage {stage} needs. Use a complete checkpoint."
        )
    shapes = [source.shape(name) for name in names]
    count = sum(torch.Size(shape).numel() for shape in shapes)
    rows = target.dtype == E4M3 and any(shape[-1] != target.shape[-1] for shape in shapes)
    if rows or count != torch.Size(target.shape).numel():
        raise InputError(
            f"tensors {', '.join(names)} have shapes {[list(shape) for shape in shapes]}, but stage {stage} needs "
            f"{list(target.shape)} for its {parameter}. Use a checkpoint of the recognised model."
        )


def _overflow(stage: str, name: str, extremes: Tensor, dtype: torch.dtype, precision: Precision) -> str:
    other = "bf16" if numerics_of(stage, "bf16").storage not in (dtype, torch.float16) else "fp32"
    return (
        f"stage {stage}: tensor {name} has values up to {extremes.abs().max():.3g}, more than {str(dtype)[6:]} can "
        f"hold. Build with --precision {other} instead of {precision}."
    )


def runtime_tables(config: ModelConfig, source: "TensorSource | None") -> dict[str, Tensor]:
    """Return the constants that the runtime needs between stages, fp32: modulation [6 or 2, C], q and k norms [C]."""
    if config.dit is None or source is None:
        return {}
    tables = {}
    known = set(source.keys())
    for name, key in table_sources(config.dit).items():
        if key not in known:
            raise InputError(f"the checkpoint has no tensor {key}, which the runtime needs. Use a complete checkpoint.")
        values = source.get(key).to(torch.float32, copy=True).reshape(-1, config.dit.dim)
        finite_extremes(key, values, source)
        tables[name] = values if name.endswith("modulation") else values[0].contiguous()
    return tables
