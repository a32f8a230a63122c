"""Counting matrix products with e4m3 operands, in both formats in which libraries describe a plan's layers."""

import json

import pytest

from scail2_rt.engines.tensorrt_backend.layers import fault, layers_of_json, layers_of_log
from scail2_rt.kernels.errors import Scail2Error


def tensor(datatype: str) -> str:
    return f"{{ Name: t, Dimensions: [-1,256], Strides: [256,1], StrideOrder: [1,0], Datatype: {datatype}, Format: x }}"


def line(kind: str, inputs: list[str], constants: list[str], name: str = "node") -> str:
    listed = (", ".join(map(tensor, types)) for types in (inputs, constants))
    return "Name: {}, LayerType: {}, Inputs: [ {}], Constants: [ {}], Outputs: [ {}], TacticName: , Metadata: ".format(
        name, kind, *listed, tensor("FP8")
    )


def report(*types: str, kind: str = "gemm", constants: tuple[str, ...] = ()) -> str:
    """One product between others, as the inspector's JSON."""
    inputs, weights = (
        [{"Name": f"i{n}", "Dimensions": [64, 64], "Format/Datatype": text} for n, text in enumerate(found)]
        for found in (types, constants)
    )
    other = {"Name": "norm", "LayerType": "kgen", "Inputs": [{"Name": "x", "Format/Datatype": "Row major linear FP32"}]}
    product = {"Name": "product", "LayerType": kind, "Inputs": inputs, "Constants": weights}
    return json.dumps({"Layers": [other, product], "Bindings": []})


@pytest.mark.parametrize(
    ("layer", "counts"),
    [
        (line("gemm", ["FP8"], ["FP8", "Float"]), True),
        (line("gemm", ["FP8", "FP8"], []), True),
        (line("gemm", ["FP8"], ["BFloat16", "Float"]), False),  # the weight was dequantised first
        (line("gemm", ["BFloat16"], ["FP8"]), False),
        (line("kgen", ["BFloat16", "Float"], ["Float"]), False),  # which quantises: FP8 is its output
        (line("runtime_fusion", ["BFloat16"], ["BFloat16"]), False),
    ],
)
def test_a_line_of_the_log(layer: str, counts: bool) -> None:
    found = layers_of_log(f"Layers:\n{line('shape_call', [], [])}\n{layer}\n\nI/O Tensors:\n")
    assert len(found) == 2
    assert [entry.multiplies_e4m3 for entry in found] == [False, counts]


@pytest.mark.parametrize("text", ["Row major linear FP8 format", "FP8", "E4M3"])
def test_the_inspectors_json(text: str) -> None:
    for whole in (report(text, text, "Row major linear BFloat16"), report(text, constants=(text,)), report(text)):
        assert fault(layers_of_json(whole), 1) is None
        assert str(fault(layers_of_json(whole), 2)).startswith(
            "1 of its 2 fp8 products multiply fp8 operands (product)"
        )


@pytest.mark.parametrize("types", [("BFloat16", "BFloat16"), ("FP8", "Row major linear BFloat16"), ()])
def test_other_operands(types: tuple[str, ...]) -> None:
    assert str(fault(layers_of_json(report(*types)), 1)).startswith("0 of its 1 fp8 products")


def test_what_is_no_product() -> None:
    assert fault(layers_of_json(report("FP8", kind="kgen")), 1) is not None
    assert fault(layers_of_json(report("Half", "Half")), 0) is None, "only fp8 stages are asked"


@pytest.mark.parametrize("text", ["", "[]", '{"Layers": ["product"]}'])
def test_a_report_without_details(text: str) -> None:
    with pytest.raises(Scail2Error, match=r"cannot be read|without detailed verbosity"):
        layers_of_json(text)
