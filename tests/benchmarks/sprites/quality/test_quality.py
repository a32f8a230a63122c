"""`scail2-rt bench quality` through the installed command, and the quality of the shipped checkpoint.

With random weights the tables must be complete, saved row by row, and resumed. The trained checkpoint must reach its
quality, and must miss it if an essential part of SCAIL-2 is broken: RoPE of the driving tokens, mask channels,
history."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from scail2_rt.benchmarks.report.record import Results, Row, load
from scail2_rt.benchmarks.sprites.quality import quality, quality_table, trials
from scail2_rt.benchmarks.sprites.quality.sheets import MARGIN, TITLE, Block, write_sheet
from scail2_rt.benchmarks.sprites.quality.trials import Answer, Variant, make_request
from scail2_rt.benchmarks.sprites.shipped import CHECKPOINT, make_engines
from scail2_rt.benchmarks.sprites.world.case_files import write_case
from scail2_rt.benchmarks.sprites.world.cases import Scene, make_scene, render_case
from scail2_rt.benchmarks.sprites.world.shapes import SHAPES
from scail2_rt.kernels.errors import InputError
from scail2_rt.kernels.rope import Rope
from scail2_rt.runtime.media.images import load_image
from scail2_rt.runtime.pipeline import conditioning, driving, pipeline, transformer
from scail2_rt.runtime.session.session import Session
from tests.support.command import Run, error_of

pytest_plugins = ["tests.support.runtime_fixtures"]

FIGURES = {"psnr", "ssim", "character_psnr", "colour_error", "shape_error", "motion_px"}


@dataclass(frozen=True, slots=True)
class Made:
    """The files and output of one call."""

    words: tuple[object, ...]
    file: Path
    sheets: Path
    stdout: str


@pytest.fixture(scope="module")
def made(scail2: Run, engines: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Two tasks of one case with the tiny random engines."""
    folder = tmp_path_factory.mktemp("quality")
    words = ("bench", "quality", "--engines", engines, "--work", folder / "work", "--steps", 1)
    file, sheets = folder / "q.json", folder / "sheets"
    result = scail2(*words, "--cases", 1, "--tasks", "swapped,extra", "--json", file, "--sheets", sheets)
    assert result.returncode == 0, result.stderr
    return Made(words, file, sheets, result.stdout)


def test_the_table_is_complete(made: Made) -> None:
    results = load(made.file)
    who = ("ours", "repeat-reference", "copy-driving", "vae")
    names = {f"default/{task}/{one}/0" for task in ("swapped", "extra") for one in who} | {
        "default/extra/one-reference/0"
    }
    assert set(results.rows) == names
    assert all(row.measured and row.values.keys() >= FIGURES for row in results.rows.values())
    assert "hidden_psnr" in results.rows["default/extra/ours/0"].values
    assert {row.kind for row in results.rows.values()} == {"ours", "baseline", "ceiling"}
    run = results.runs[0]
    assert {"command", "date", "device", "versions", "settings", "engines"} <= run.keys()
    assert run["settings"]["sampling"]["steps"] == 1
    last = json.loads(made.stdout.splitlines()[-1])
    assert last["failed"] == []
    assert last["summary"]["default/extra/ours"]["cases"] == 1
    for word in (*who, "character PSNR", "above baseline", "swapped"):
        assert word in made.stdout
    assert {path.name for path in made.sheets.iterdir()} == {"swapped.png", "extra.png"}


def test_a_second_call_continues_and_a_compared_one_agrees(made: Made, scail2: Run, tmp_path: Path) -> None:
    """Existing rows are not measured again; rows lost by an interruption are, with the same values."""
    document = json.loads(made.file.read_text())
    lost = next(row for row in document["rows"] if row["name"] == "default/swapped/ours/0")
    document["rows"].remove(lost)
    shorter = tmp_path / "q.json"
    shorter.write_text(json.dumps(document))
    words = (*made.words, "--cases", 1, "--tasks", "swapped", "--json", shorter, "--compare", made.file)
    result = scail2(*words)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("default/swapped/") == 1
    again = load(shorter)
    assert again.rows["default/swapped/ours/0"].values == pytest.approx(lost["values"], rel=1e-4)
    assert [row.run for row in again.rows.values() if row.name == lost["name"]] == [1]
    other = scail2(*made.words[:-1], 2, "--cases", 1, "--tasks", "swapped", "--json", shorter)
    assert "other settings (sampling)" in error_of(other)


def test_rows_are_saved_as_they_come(
    engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in the second case keeps the row of the first; a failing case gives a row with the error."""
    calls = iter((None, RuntimeError("the device fell over"), KeyboardInterrupt()))
    video = np.zeros((33, 128, 128, 3), np.uint8)

    def interrupted(*_: object) -> tuple[np.ndarray, tuple[object, ...]]:
        error = next(calls)
        if error is not None:
            raise error
        return video, ()

    monkeypatch.setattr(quality, "make_video", interrupted)
    monkeypatch.setattr(quality, "round_trip", lambda *_: video)
    options = quality.QualityOptions(None, engines, tmp_path, 3, ("animate",), output=tmp_path / "q.json")
    with pytest.raises(KeyboardInterrupt):
        quality.run_quality(options)
    rows = load(tmp_path / "q.json").rows
    assert rows["default/animate/ours/0"].measured
    assert rows["default/animate/ours/1"].failure == "RuntimeError: the device fell over"
    assert "default/animate/vae/1" in rows
    assert "default/animate/ours/2" not in rows


def test_a_long_clip_is_followed_over_its_segments(engines: Path, tmp_path: Path) -> None:
    options = quality.QualityOptions(None, engines, tmp_path, 1, ("long",), sampling={"steps": 1})
    results = quality.run_quality(options)
    values = results.rows["default/long/ours/0"].values
    assert {
        "segment_1",
        "segment_2",
        "segment_3",
        "drift_db",
        "colour_drift",
        "seam",
        "frame_000",
        "frame_088",
        "colour_088",
    } <= set(values)
    assert "segment_4" not in values
    assert values["drift_db"] == pytest.approx(values["segment_3"] - values["segment_1"])
    assert "segment 3" in quality_table.quality_table(results)
    assert {"segment_3", "colour_drift", "seam", "psnr"} <= set(shown := quality_table.shown(values))
    assert not {"frame_000", "colour_088"} & set(shown)


def test_a_perfect_video_scores_perfectly() -> None:
    case = render_case(make_scene("extra", 1))
    answer = Answer.of(case)
    scores = answer.score(case.truth)
    assert scores["psnr"] == scores["character_psnr"] == scores["hidden_psnr"] == 100
    assert scores["colour_error"] == scores["shape_error"] == scores["motion_px"] == 0
    for make in trials.BASELINES.values():
        baseline = answer.score(make(answer))
        assert baseline["character_psnr"] < 20
        assert baseline["motion_px"] > 2


def test_swapping_colours_swaps_who_does_what() -> None:
    usual, swapped = (render_case(make_scene("two", 0, swapped=swapped)) for swapped in (False, True))
    np.testing.assert_array_equal(usual.driving, swapped.driving)
    np.testing.assert_array_equal(usual.reference_mask, swapped.reference_mask)
    places = [
        np.flatnonzero((mask == usual.scene.driving.colours[1]).all(-1))
        for mask in (usual.driving_mask, swapped.driving_mask)
    ]
    assert not set(places[0]) & set(places[1])
    assert (usual.labels > 0).mean() == pytest.approx((swapped.labels > 0).mean(), rel=0.15)
    assert Answer.of(swapped).score(usual.truth)["character_psnr"] < 20


def test_comparison_is_over_the_cases_that_both_have() -> None:
    def results(*values: float) -> Results:
        rows = [Row(f"default/animate/ours/{i}", values={"psnr": v, "character_psnr": v}) for i, v in enumerate(values)]
        return Results("sprites", ({},), {row.name: row for row in rows})

    found = quality_table.differences(results(20.0, 22.0, 99.0), results(20.2, 22.6))
    assert [d.figure for d in found] == ["psnr", "character_psnr"]
    assert [d.cases for d in found] == [2, 2]
    assert [d.change for d in found] == pytest.approx([0.4, 0.4])
    table = quality_table.difference_table(found, 0.3)
    assert table.count("DIFFERENT") == 2
    assert "DIFFERENT" not in quality_table.difference_table(found, 0.5)


def test_variants_change_one_thing_each() -> None:
    usual = quality.QualityOptions(None, None, Path("work")).usual
    found = {variant.name: variant for variant in trials.variants(usual)}
    assert {"bf16", "fp8", "fp8-8bit", "fp8-sdpa", "guidance-5", "steps-6", "steps-6-euler", "steps-20"} <= set(found)
    for name, variant in found.items():
        base = found["steps-6"].options if name.startswith("steps-6-") else usual.options
        changed = [key for key, value in variant.options.items() if value != base[key]]
        other = (variant.precision, variant.attention) != (usual.precision, usual.attention)
        assert len(changed) + other == 1, variant


def test_what_cannot_run_here_is_said_and_the_rest_runs(engines: Path, tmp_path: Path) -> None:
    """A folder of another precision, an attention variant that needs a GPU, an unknown option."""
    options = quality.QualityOptions(None, engines, tmp_path, 1, output=tmp_path / "q.json")
    runner = quality._Runner(options, debug=False)
    runner.run_variant(Variant("fp8", "fp8"), ("animate",))
    runner.run_variant(Variant("odd", options={"no_such_option": 1}), ("animate",))
    if not torch.cuda.is_available():
        runner.run_variant(Variant("flash", attention="flash"), ("animate",))
    assert not [row.name for row in runner.results.rows.values() if row.measured]
    notes = [row.note for row in runner.results.rows.values()]
    assert "has the precision fp32" in notes[0]
    assert "no_such_option" in notes[1]
    assert all("GPU" in note for note in notes[2:])


@pytest.mark.parametrize("table", ["tasks", "variants", "long"])
def test_what_comes_first_must_run(made: Made, engines: Path, tmp_path: Path, table: str) -> None:
    """No checkpoint, or a file of other settings, is a mistake and not a table of rows that were not measured."""
    with pytest.raises(InputError, match="no checkpoint"):
        quality.run_quality(quality.QualityOptions(tmp_path / "none", None, tmp_path / "work", 1, table=table))
    before = made.file.read_bytes()
    with pytest.raises(InputError, match="other settings"):
        quality.run_quality(quality.QualityOptions(None, engines, tmp_path, 1, table=table, output=made.file))
    assert made.file.read_bytes() == before


def test_rows_of_another_drawn_world_are_not_continued(
    made: Made, engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = {"steps": 1}
    options = quality.QualityOptions(None, engines, tmp_path, 1, ("swapped",), sampling=sampling, output=made.file)
    quality.run_quality(options)  # nothing is missing
    monkeypatch.setattr(quality, "drawing_hash", lambda: "another")
    with pytest.raises(InputError, match=r"other settings \(drawing\)"):
        quality.run_quality(options)


def test_a_variant_of_which_only_other_videos_are_there_is_left_out() -> None:
    values = dict.fromkeys(quality_table.COLUMNS, 1.0)
    names = ("default/extra/ours/0", "steps-4/extra/ours/0", "steps-6/extra/one-reference/0")
    rows = {name: Row(name, values=values) for name in names}
    table = quality_table.quality_table(Results("sprites", ({},), rows))
    assert "steps-4" in table
    assert "steps-6" not in table


def test_a_sheet_has_room_for_long_names_and_titles(tmp_path: Path) -> None:
    """The text does not overlap the pictures and the border, which stays white."""
    black = np.zeros((2, 16, 16, 3), np.uint8)
    name, title = "a name that is rather long", "a title that is longer than two small frames need by far"
    write_sheet(tmp_path / "s.png", [Block(title, [("reference", black[0])], {name: black, "b": black})])
    ink = load_image(tmp_path / "s.png").min(-1) < 128
    assert not ink[:, -MARGIN:].any()
    assert ink[:TITLE].any()
    right_of_reference = ink[2 * TITLE : 2 * TITLE + 16, MARGIN + 16 :]
    assert not right_of_reference[:, :MARGIN].any()
    columns = np.flatnonzero(right_of_reference.all(0))  # those of the two frames
    assert len(columns) == 32
    assert not right_of_reference[:, columns[0] - MARGIN + 2 : columns[0]].any()
    assert right_of_reference[:, : columns[0]].any()


def test_mistakes_are_one_line(scail2: Run, engines: Path, tmp_path: Path) -> None:
    words = ("bench", "quality", "--engines", engines, "--work", tmp_path)
    assert "no task fly" in error_of(scail2(*words, "--tasks", "fly"))
    assert "Leave out --tasks" in error_of(scail2(*words, "--tasks", "two", "--long"))


def test_a_comparison_with_nothing_in_common_fails(made: Made, scail2: Run, tmp_path: Path) -> None:
    """The first file has other cases than the second."""
    other = tmp_path / "other.json"
    other.write_text(made.file.read_text().replace("default/swapped/ours", "default/two/ours"))
    words = (*made.words, "--cases", 1, "--tasks", "swapped", "--json", made.file, "--compare")
    document = json.loads(other.read_text())
    document["rows"] = [row for row in document["rows"] if row["name"] == "default/two/ours/0"]
    other.write_text(json.dumps(document))
    result = scail2(*words, other)
    assert result.returncode == 1
    assert "no case in common" in json.loads(result.stdout.splitlines()[-1])["failed"][0]


# The shipped checkpoint, at the benchmark's own sampling. Measured: 22.3 dB with two characters and 14.2 or 15.4
# broken; 22.1 dB in the second segment, its seam 4 levels and 22 broken.

TWO_DB, SECOND_SEGMENT_DB, SEAM_LEVELS = 19.0, 20.0, 8.0
COMMITTED = Path(quality.__file__).parents[2] / "results" / "sprites" / "quality.json"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    folder = tmp_path_factory.mktemp("sprites") / "engines"
    make_engines(CHECKPOINT, folder, precision="fp32")
    with Session.open(folder, backend="torch") as session:
        yield session


def two_characters(session: Session, folder: Path) -> float:
    """PSNR in dB on the characters of a case with two, each bound by its colour."""
    return generated(session, folder, make_scene("two", 1))["character_psnr"]


def two_segments(session: Session, folder: Path) -> dict[str, float]:
    """A clip whose second segment starts from the first one's last frames."""
    return generated(session, folder, make_scene("animate", 0, frames=61))


def generated(session: Session, folder: Path, plan: Scene) -> dict[str, float]:
    case = render_case(plan)
    write_case(case, folder / "case")
    request = make_request(folder / "case", plan.seed, Variant("test"))
    video, segments = quality.make_video(session, request)
    answer = Answer.of(case)
    return answer.score(video) | (answer.follow(video, segments) if len(segments) > 1 else {})


def test_the_trained_model_animates_each_character_by_its_colour(trained: Session, tmp_path: Path) -> None:
    assert two_characters(trained, tmp_path) > TWO_DB


def test_a_second_segment_goes_on_where_the_first_ended(trained: Session, tmp_path: Path) -> None:
    found = two_segments(trained, tmp_path)
    assert found["segment_2"] > SECOND_SEGMENT_DB
    assert found["seam"] < SEAM_LEVELS


@pytest.mark.parametrize("task", SHAPES)
def test_pictures_of_another_shape_cost_little(trained: Session, tmp_path: Path, task: str) -> None:
    """`--fit auto` is within 1.5 dB of equal shapes on the character, and more than 5 dB above the official crop."""
    found = {}
    for who, equal, fit in (("equal", True, "auto"), ("auto", False, "auto"), ("official", False, "official")):
        case = trials.held_out_case(task, 0, equal, frames=9)
        write_case(case, tmp_path / who)
        options = {"size": trials.frame_of(task), "fit": fit, "allow_mask_problems": True}
        video, _ = quality.make_video(trained, make_request(tmp_path / who, 0, Variant("test"), **options))
        found[who] = Answer.of(case).score(video)["character_psnr"]
    assert found["auto"] > found["equal"] - 1.5
    assert found["auto"] > found["official"] + 5


def test_a_shaped_task_is_measured_three_ways(engines: Path, tmp_path: Path) -> None:
    """With `auto`, with the official crop and with equal shapes; the trivial videos have other shapes."""
    options = quality.QualityOptions(None, engines, tmp_path, 1, ("edge",), sampling={"steps": 1}, sheets=tmp_path)
    rows = quality.run_quality(options).rows
    assert set(rows) == {f"default/edge/{who}/0" for who in ("ours", "fit-official", "equal-shapes", "vae")}
    assert all(row.measured for row in rows.values())
    assert load_image(tmp_path / "edge.png").std() > 5


def test_swapped_colours_swap_who_does_what(trained: Session, tmp_path: Path) -> None:
    """With swapped colours the output is nearer to the swapped truth than to the usual one, and vice versa."""
    cases = [render_case(make_scene("two", 1, swapped=swapped)) for swapped in (False, True)]
    for case, other in (cases, cases[::-1]):
        folder = tmp_path / str(case is cases[1])
        write_case(case, folder / "case")
        request = make_request(folder / "case", 1, Variant("test"))
        video, _ = quality.make_video(trained, request)
        mine, theirs = (Answer.of(truth).score(video)["character_psnr"] for truth in (case, other))
        assert mine > theirs + 4


def test_the_committed_table_is_reproduced(scail2: Run, tmp_path: Path) -> None:
    """One case of it, through the installed command."""
    words = ("bench", "quality", "--tasks", "closeup", "--cases", 1, "--work", tmp_path, "--compare", COMMITTED)
    result = scail2(*words)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "default/closeup" in result.stdout
    assert "fit-reference" in result.stdout


def test_it_rests_on_the_rotary_embedding_of_driving_tokens(
    trained: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Driving tokens without their positions: RoPE rotates them by 0."""
    table = transformer.rope_table

    def broken(frames: int, height: int, width: int, *rest: object) -> Rope:
        rope = table(frames, height, width, *rest)  # type: ignore[arg-type]
        driving_rows = slice(len(rope.cos) - frames * height * width // 4, None)
        rope.cos[driving_rows], rope.sin[driving_rows] = 1, 0
        return rope

    monkeypatch.setattr(transformer, "rope_table", broken)
    trained.constants.drop()  # the table of this layout
    try:
        assert two_characters(trained, tmp_path) < TWO_DB
    finally:
        trained.constants.drop()


def test_it_rests_on_the_mask_channels(trained: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = conditioning.mask_latents
    for module in (conditioning, driving):
        monkeypatch.setattr(module, "mask_latents", lambda pixels: torch.zeros_like(masks(pixels)))
    assert two_characters(trained, tmp_path) < TWO_DB


def test_it_rests_on_the_history_overwrite(trained: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The history mask marks the first latents as clean, but they are not replaced."""
    monkeypatch.setattr(pipeline, "overwrite_history", lambda x, clean: x)
    assert two_segments(trained, tmp_path)["seam"] > SEAM_LEVELS
