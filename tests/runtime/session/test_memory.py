"""Which of the three memory plans is taken, and what it says."""

import pytest

from scail2_rt.export.models.config import DiTConfig
from scail2_rt.kernels.attention.variants import EIGHT_BIT, SDPA
from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.geometry import Layout
from scail2_rt.runtime.session.memory import activation_bytes, choose_plan, resident_stages

GIB = 2**30
BLOCKS = [GIB] * 10


@pytest.mark.parametrize(
    ("budget", "kind", "resident"),
    [
        *((16, "resident", 10), (15, "phased", 10), (14, "phased", 10)),
        *((13, "streamed", 7), (8, "streamed", 2), (6, "streamed", 0)),
    ],
)
def test_the_first_plan_that_fits(budget: int, kind: str, resident: int) -> None:
    plan = choose_plan(BLOCKS, work=4 * GIB, decode=6 * GIB, budget=budget * GIB)
    assert (plan.kind, plan.resident_blocks) == (kind, resident)
    assert plan.needed <= plan.budget == budget * GIB
    assert plan.drops_blocks == (kind != "resident")
    assert len(resident_stages(plan)) == 3 * resident
    assert f"of {budget}.0 GiB planned" in plan.line


def test_too_little_memory_says_how_much_is_needed() -> None:
    with pytest.raises(InputError, match=r"at least 6\.6 GiB.*--vram-limit"):
        choose_plan(BLOCKS, work=4 * GIB, decode=5 * GIB, budget=5 * GIB)


def test_one_block_is_never_streamed_alone() -> None:
    assert choose_plan(BLOCKS, 4 * GIB, 4 * GIB, int(13.9 * GIB)).resident_blocks == 7
    assert choose_plan([GIB] * 3, 4 * GIB, 4 * GIB, int(6.9 * GIB)).resident_blocks == 0


def test_activations_grow_with_tokens_passes_and_width() -> None:
    config, layout = DiTConfig(dim=256, heads=2, layers=2, ffn_dim=512), Layout.of(81, 512, 896)
    one = activation_bytes(config, layout, 1, 2, EIGHT_BIT)
    assert one < activation_bytes(config, layout, 2, 2, EIGHT_BIT)
    assert one < activation_bytes(config, layout, 1, 2, SDPA) < activation_bytes(config, layout, 1, 4, SDPA)
    assert one == layout.tokens * config.dim * 13 + (layout.reference_tokens + layout.driving_tokens) * config.dim * 4
