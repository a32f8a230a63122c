"""Which matrix products of a plan multiply e4m3 operands, read from the library's description of the plan's layers.

A plan can be correct but slow: an fp8 stage whose operands are dequantised first runs its product in 16 bits. The
operands' data types show this; the tactic's name does not. Searching for wrong products is not sufficient, because a
product that lost its quantisation can be fused into a layer without a product in its name. So products with an e4m3
input and an e4m3 weight are counted, and there must be as many as the stage has e4m3 linears. Two formats are read: the
list at the end of a build's verbose log (TensorRT for RTX, at build time) and the engine inspector's JSON (both
libraries, on a GPU; written from its documentation, not tested with JSON of a real plan). Plans are built with detailed
verbosity for both.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from scail2_rt.kernels.errors import Scail2Error

_PRODUCT = re.compile(r"gemm|matmul|matrix_?multiply|fully_?connected", re.IGNORECASE)
_FP8 = re.compile(r"FP8|E4M3|Float8", re.IGNORECASE)
_LINE = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), Inputs: \[(?P<inputs>.*?)\], "
    r"Constants: \[(?P<constants>.*?)\], Outputs: ",
    re.MULTILINE,
)
_DATATYPE = re.compile(r"Datatype: ([^,]*)")


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a plan: name, kind, and the types of its inputs and constants in the library's notation. (If a
    library folds weights into the layer, there are no constants.)"""

    name: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...] = ()

    @property
    def multiplies_e4m3(self) -> bool:
        """Whether two operands are e4m3, or the only visible one of a product whose weight is not listed."""
        inputs, constants = (sum(bool(_FP8.search(t)) for t in types) for types in (self.inputs, self.constants))
        hidden = not self.constants and len(self.inputs) == 1 and bool(_PRODUCT.search(f"{self.kind} {self.name}"))
        return inputs > 0 and (inputs + constants > 1 or hidden)


def layers_of_log(text: str) -> list[Layer]:
    """Parse the layers in a build's list ("Layers:", then one per line)."""
    return [
        Layer(
            found["name"],
            found["kind"],
            tuple(_DATATYPE.findall(found["inputs"])),
            tuple(_DATATYPE.findall(found["constants"])),
        )
        for found in _LINE.finditer(text)
    ]


def layers_of_json(text: str) -> list[Layer]:
    """Parse the layers in the engine inspector's JSON. Raises Scail2Error if it has no details or is not JSON."""
    try:
        entries = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise Scail2Error(f"the engine inspector's report cannot be read ({error}). Build the plans again.") from error
    if not all(isinstance(entry, Mapping) for entry in entries):
        raise Scail2Error("the plan was built without detailed verbosity. Build the plans again.")
    return [
        Layer(
            str(entry.get("Name", "?")),
            " ".join(str(entry[key]) for key in ("LayerType", "ParameterType") if key in entry),
            _types(entry.get("Inputs", [])),
            _types(entry.get("Constants", [])),
        )
        for entry in entries
    ]


def _types(entries: Iterable[Any]) -> tuple[str, ...]:
    return tuple(
        f"{entry.get('Datatype', '')} {entry.get('Format/Datatype', '')}" if isinstance(entry, Mapping) else ""
        for entry in entries
    )


def fault(layers: Iterable[Layer], expected: int) -> str | None:
    """Describe the fault of a plan whose stage has `expected` e4m3 linears; None if enough products multiply e4m3."""
    found = [layer for layer in layers if layer.multiplies_e4m3]
    if len(found) >= expected:
        return None
    names = f" ({', '.join(layer.name for layer in found)})" if found else ""
    return (
        f"{len(found)} of its {expected} fp8 products multiply fp8 operands{names}, so the others would run in 16 bits"
    )
