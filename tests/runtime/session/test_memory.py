"""The placement of weights in GPU memory, and the memory estimate."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from scail2_rt.engines.backend import Execution
from scail2_rt.export.models.config import DiTConfig
from scail2_rt.kernels.attention.variants import EIGHT_BIT, SIXTEEN_BIT
from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.geometry import Layout
from scail2_rt.runtime.core.request import Request
from scail2_rt.runtime.pipeline.placement import apply, lift_limit
from scail2_rt.runtime.session import memory
from scail2_rt.runtime.session.memory import (
    LIBRARY_BYTES,
    MemoryModel,
    activation_bytes,
    choose_placement,
    memory_budget,
    shared_bytes,
)
from scail2_rt.runtime.session.session import Session

pytest_plugins = ["tests.support.runtime_fixtures"]
GIB = 2**30
NOTHING = MemoryModel((GIB,) * 10, *[0] * 4, 1, *[0] * 6)
MODEL = replace(NOTHING, work=4 * GIB, vae_decode=6 * GIB)


@pytest.mark.parametrize(
    ("budget", "kind", "resident", "keeps_graphs"),
    [
        *((20, "resident", 10, True), (19, "resident", 10, False), (16, "resident", 10, False)),
        *((15, "phased", 10, False), (14, "phased", 10, False)),
        *((13, "streamed", 7, False), (8, "streamed", 2, False), (6, "streamed", 0, False)),
    ],
)
def test_the_first_way_that_fits(budget: int, kind: str, resident: int, keeps_graphs: bool) -> None:
    way = choose_placement(MODEL, budget * GIB)
    assert (way.kind, way.resident_blocks, way.keeps_graphs) == (kind, resident, keeps_graphs)
    assert way.needed <= way.budget == budget * GIB
    assert way.drops_blocks == (kind != "resident")
    assert len(way.resident) == 3 * resident
    assert len(way.streamed) == 3 * (10 - resident)
    assert f"of {budget}.0 GiB planned" in way.line


def test_without_recorded_steps_none_are_kept() -> None:
    assert not choose_placement(MODEL, 100 * GIB, graphs=False).keeps_graphs


def test_too_little_memory_says_how_much_is_needed() -> None:
    with pytest.raises(InputError, match=rf"at least {6 + LIBRARY_BYTES / GIB:.1f} GiB.*--vram-limit"):
        choose_placement(replace(MODEL, vae_decode=5 * GIB), 5 * GIB)


def test_one_block_is_never_streamed_alone() -> None:
    model = replace(NOTHING, work=4 * GIB, vae_decode=4 * GIB)
    assert choose_placement(model, int(13.9 * GIB)).resident_blocks == 7
    assert choose_placement(replace(model, blocks=(GIB,) * 3), int(6.9 * GIB)).resident_blocks == 0


def test_phases_hold_what_they_run() -> None:
    model = MemoryModel((10, 10, 10), 1, 20, 30, 4, 25, 50, 60, 7, 8, 9, 80)
    way = choose_placement(model, 10**6)
    resident = 30 + 1 + 8 + 9
    assert model.phases(way) == {
        "text": 20,
        "clip": 30,
        "reference": 50 + 30,  # CLIP's weights are on their way
        "driving": resident + 80 + 7,
        "context": resident + 80 + 4,
        "denoise": resident + 80,
        "decode": resident + 80 + 60,
    }
    assert way.needed == max(model.phases(way).values()) == resident + 140
    assert (way.references, way.context_block) == (80, 25)
    streamed = choose_placement(model, 127)
    assert (streamed.kind, streamed.resident_blocks) == ("streamed", 0)
    assert model.phases(streamed)["denoise"] == 1 + 20 + 17 + 80
    assert model.phases(streamed)["decode"] == 1 + 17 + 60  # blocks and recorded graphs were dropped


def test_activations_grow_with_tokens_passes_and_width() -> None:
    config, layout = DiTConfig(dim=256, heads=2, layers=2, ffn_dim=512), Layout.of(81, 512, 896)
    one = activation_bytes(config, layout, 1, 2, EIGHT_BIT)
    assert one < activation_bytes(config, layout, 2, 2, EIGHT_BIT)
    assert (
        one < activation_bytes(config, layout, 1, 2, SIXTEEN_BIT) < activation_bytes(config, layout, 1, 4, SIXTEEN_BIT)
    )
    assert one == layout.tokens * config.dim * (4 + 6 + 3 + 6)
    two = shared_bytes(config, layout, 1, 2, EIGHT_BIT, 2)
    assert shared_bytes(config, layout, 1, 2, EIGHT_BIT, 1) == one
    assert one / 2 < two < one  # half of the rows, plus the exchange buffers
    assert two < shared_bytes(config, layout, 1, 2, SIXTEEN_BIT, 2)


def test_what_does_not_fit_the_computer_is_refused_by_the_check(
    case: Path, engines: Path, monkeypatch: pytest.MonkeyPatch, request_of: Callable[..., Request]
) -> None:
    with Session.open(engines, backend="torch", device="cpu") as session:
        assert session.check(request_of()).estimate is not None
        monkeypatch.setattr(memory, "host_memory", lambda: 1 << 20)
        with pytest.raises(
            InputError, match=r"needs .* GiB of memory besides its weights.*0\.0 GiB free\. Use a smaller"
        ):
            session.check(request_of())


class TestOthersInTheProcess:
    """A host program such as ComfyUI keeps other models on the GPU, in the same allocator."""

    @pytest.fixture
    def shares(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        """A simulated GPU of 24 GiB, 10 of them free and 14 held by the allocator; records the allocator's fraction."""
        set_to: list[float] = []
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (10 * GIB, 24 * GIB))
        monkeypatch.setattr("torch.cuda.memory_reserved", lambda: 14 * GIB)
        monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", set_to.append)
        return set_to

    def test_what_they_hold_is_no_room(self, shares: list[float]) -> None:
        assert memory_budget(None) == 24 * GIB - LIBRARY_BYTES
        assert memory_budget(None, others=8 * GIB) == 16 * GIB - LIBRARY_BYTES
        assert memory_budget(12 * GIB, others=8 * GIB) == 12 * GIB - LIBRARY_BYTES
        assert memory_budget(20 * GIB, others=8 * GIB) == 16 * GIB - LIBRARY_BYTES

    def test_a_limit_is_the_runs_and_leaves_them_theirs(self, shares: list[float]) -> None:
        class Engines:
            execution = Execution(vram_limit=12 * GIB)

            def stream(self, stages: object) -> None:
                pass

        way = choose_placement(MODEL, 10 * GIB)
        apply(way, Engines(), others=8 * GIB)  # type: ignore[arg-type]
        lift_limit(Engines())  # type: ignore[arg-type]
        assert shares == [18 / 24, 1.0]

    def test_a_run_asks_for_them(self, request_of: Callable[..., Request], engines: Path) -> None:
        asked: list[None] = []
        with Session.open(engines, backend="torch") as session:
            session.others = lambda: asked.append(None) or 0  # type: ignore[func-returns-value]
            plan = session.check(request_of(steps=1, guidance=1.0, frames=5))
            before = len(asked)
            list(session.animate(plan))
        assert (before, len(asked) > before) == (1, True)
