"""How a broken rule is reported."""

ALIGNMENT = 256  # bytes: TensorRT's requirement for scratch memory, and ours for every address


class Violation(AssertionError):
    """The tested code used TensorRT in a forbidden way."""


def demand(condition: bool, broken: str) -> None:
    if not condition:
        raise Violation(broken)
