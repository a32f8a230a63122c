"""What TensorRT's engine inspector says about the matrix products of a plan.

A plan can be correct and slow: an fp8 stage whose product was dequantised first runs in 16 bits. The layer's tactic
name does not tell; the data types of the operands do. The inspector's JSON (plans are built with detailed verbosity)
has one object a layer, with its kind and, for every input, a description such as "Row major linear FP8 format". The
form is the documented one; no real report has been seen here.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from scail2_rt.export.models.precision import Numerics
from scail2_rt.kernels.errors import Scail2Error

_PRODUCT = re.compile(r"gemm|matmul|matrix_?multiply|fully_?connected", re.IGNORECASE)
_TYPES = {
    "FP8": re.compile(r"FP8|E4M3", re.IGNORECASE),
    "BF16": re.compile(r"BF16|BFloat16", re.IGNORECASE),
    "FP16": re.compile(r"FP16|Half|\bFloat16", re.IGNORECASE),
    "FP32": re.compile(r"FP32|TF32|\bFloat(32)?\b", re.IGNORECASE),
    "INT8": re.compile(r"INT8", re.IGNORECASE),
}


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix product of a plan: the layer's name, and the types of its first operands (the weight is missing from
    the list where TensorRT has folded it into the layer)."""

    layer: str
    operands: tuple[str, ...]


def products(text: str) -> list[Product]:
    """The matrix products in the inspector's JSON of one engine. Scail2Error when it has no details or is no JSON."""
    try:
        layers = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise Scail2Error(f"the engine inspector's report cannot be read ({error}); build the plans again.") from error
    found = []
    for layer in layers:
        if not isinstance(layer, Mapping):
            raise Scail2Error("the plan was built without detailed verbosity, so its data types are unknown.")
        kinds = (str(layer.get(key, "")) for key in ("LayerType", "ParameterType", "Name"))
        if any(_PRODUCT.search(kind) for kind in kinds):
            found.append(Product(str(layer.get("Name", "?")), tuple(_types(layer.get("Inputs", [])))[:2]))
    return found


def _types(inputs: list[Any]) -> Iterator[str]:
    for entry in inputs:
        described = str(entry.get("Format/Datatype", entry.get("Datatype", ""))) if isinstance(entry, Mapping) else ""
        yield next((name for name, pattern in _TYPES.items() if pattern.search(described)), described or "unknown")


def fault(text: str, numerics: Numerics) -> str | None:
    """Why a stage's plan does not compute as it should; None when every product of an fp8 stage is an fp8 one.

    Stages of other numerics have nothing that could be lost."""
    if not numerics.fp8:
        return None
    found = products(text)
    if not found:
        return "the plan shows no matrix product, so nothing says that it computes in fp8"
    for product in found:
        if not product.operands or set(product.operands) != {"FP8"}:
            return (
                f"the product {product.layer} has operands of {', '.join(product.operands) or 'unknown type'}, not FP8"
            )
    return None
