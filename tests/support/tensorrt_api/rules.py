"""How a broken rule is reported."""

ALIGNMENT = 256  # bytes; what TensorRT asks of scratch memory, and what we hold for every address


class Violation(AssertionError):
    """The tested code used TensorRT in a forbidden way."""


def demand(condition: bool, broken: str) -> None:
    if not condition:
        raise Violation(broken)
