"""The drawn world: the conditions for a correct case, and the training data made from cases.

A wrong mask colour, joint or background would make every quality value meaningless without any failure, so the rules of
MODEL §1 are checked on the drawn pixels, for every task. The training data of the transformer is compared with the
tensors that the runtime computes from the same cases as files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from scail2_rt.benchmarks.sprites.shipped import make_engines
from scail2_rt.benchmarks.sprites.training import dataset, model
from scail2_rt.benchmarks.sprites.training.drawing import draw_pictures, make_scenes, paint
from scail2_rt.benchmarks.sprites.world import cases
from scail2_rt.benchmarks.sprites.world.case_files import case_request, write_case
from scail2_rt.benchmarks.sprites.world.cases import TASKS, Scene, SpriteCase, make_scene, render_case
from scail2_rt.benchmarks.sprites.world.figures import AX, AY, BX, BY, FIELDS, LABEL, RA, RB
from scail2_rt.benchmarks.sprites.world.motions import HELD_OUT, PRACTISED, Motion, Random, make_motion
from scail2_rt.benchmarks.sprites.world.raster import UNITS, Picture, black, draw_picture
from scail2_rt.engines.engine_set import EngineSet, open_engines
from scail2_rt.export.checkpoint.random_checkpoint import TOKENIZER_FILE
from scail2_rt.export.models.dit import DiT, DiTInputs
from scail2_rt.runtime.masks.palette import COLOURS, PALETTE_RGB, RGB, background_of, mask_latents
from scail2_rt.runtime.pipeline.conditioning import clip_features, encode_prompts, encode_references, load_reference
from scail2_rt.runtime.pipeline.driving import encode_driving, read_clips
from scail2_rt.runtime.pipeline.preprocess import normalise_video
from scail2_rt.runtime.pipeline.vae import encode_clip
from scail2_rt.runtime.session.check import check_request
from tests.support.small import DIT, random_tensors

FRAMES = 5
SEEDS = range(4)  # both kinds of motion, and both things that an extra reference shows


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[SpriteCase]]:
    """A few cases of every task."""
    return {task: [render_case(make_scene(task, seed, frames=FRAMES)) for seed in SEEDS] for task in TASKS}


def bare(picture: Picture) -> np.ndarray:
    """The picture without its characters."""
    return draw_picture(Picture(picture.parts[:, :0], picture.background), *cases.SIZE)[0]


def away_from(*masks: np.ndarray) -> np.ndarray:
    """bool: pixels outside the masks (bool [T, H, W], T may be 1) and not near them, without soft edges."""
    touched = np.logical_or.reduce(np.broadcast_arrays(*masks))
    return F.max_pool2d(torch.from_numpy(touched).float()[:, None], 5, 1, 2)[:, 0].numpy() == 0


def colours_of(mask: np.ndarray) -> set[tuple[int, ...]]:
    packed = np.unique(mask.reshape(-1, 3).astype(np.uint32) @ (1 << 16, 1 << 8, 1))
    return {(colour >> 16, colour >> 8 & 255, colour & 255) for colour in packed.tolist()}


def test_a_seed_gives_the_same_case_again() -> None:
    first, again, other = (render_case(make_scene("three", seed, frames=3)) for seed in (7, 7, 8))
    assert first.scene.prompt == again.scene.prompt
    for name in ("reference", "reference_mask", "driving", "driving_mask", "truth", "labels", "hidden"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    np.testing.assert_array_equal(first.scene.joints, again.scene.joints)
    assert (first.truth != other.truth).mean() > 0.3


@pytest.mark.parametrize("task", TASKS)
def test_training_and_test_cases_of_a_seed_differ(task: str) -> None:
    train, test = (make_scene(task, 1, split, FRAMES) for split in cases.SPLITS)
    assert train.joints.shape != test.joints.shape or np.abs(train.joints - test.joints).max() > 1
    assert np.abs(train.truth.background - test.truth.background).max() > 0.05


@pytest.mark.parametrize("task", TASKS)
def test_masks_follow_the_colour_rules(drawn: dict[str, list[SpriteCase]], task: str) -> None:
    """Only palette colours, with hard edges; the background is white if it must show; a character has one colour in
    reference mask and driving mask, and no two characters share a colour."""
    palette = {tuple(colour) for colour in PALETTE_RGB.tolist()}
    for case in drawn[task]:
        mode = case.scene.mode
        assert mode == ("replace" if task == "replace" else "animate")
        of_reference, of_driving = colours_of(case.reference_mask), colours_of(case.driving_mask)
        assert of_reference | of_driving <= palette
        shown, hidden = background_of(mode, "reference"), background_of(mode, "driving")
        assert {shown, hidden} == {cases.WHITE, cases.BLACK}
        assert of_reference - {shown} == of_driving - {hidden}
        assert len(of_reference) == len(of_driving) == 1 + {"two": 2, "three": 3}.get(task, 1)
        assert shown in of_reference
        assert hidden in of_driving
        for _, mask in case.extras:
            assert colours_of(mask) <= palette
            assert colours_of(mask) - {cases.BLACK, cases.WHITE} <= of_reference


@pytest.mark.parametrize("task", TASKS)
def test_masks_lie_on_what_is_drawn(drawn: dict[str, list[SpriteCase]], task: str) -> None:
    """Outside a mask and its edge the picture is the scene without characters; inside it mostly differs from that."""
    for case in drawn[task]:
        views = (
            (case.reference[None], case.reference_mask[None], case.scene.reference),
            (case.driving, case.driving_mask, case.scene.driving),
        )
        for image, mask, view in views:
            figure, scene = (mask != view.colours[0]).any(-1), bare(view.picture)
            outside = away_from(figure)
            np.testing.assert_array_equal(image[outside], scene[outside])
            assert (image[figure] != scene[figure]).any(-1).mean() > 0.9


@pytest.mark.parametrize("task", TASKS)
def test_joints_lie_on_their_characters(drawn: dict[str, list[SpriteCase]], task: str) -> None:
    for case in drawn[task]:
        characters = len(case.scene.driving.colours) - 1
        found, joints = [], np.floor(case.scene.joints).astype(int).reshape(FRAMES, characters, -1, 2)
        for number in range(characters):
            x, y = np.moveaxis(joints[:, number], -1, 0)
            inside = (x >= 0) & (y >= 0) & (x < UNITS) & (y < UNITS)
            assert inside.mean() > 0.6
            frame = np.nonzero(inside)[0]
            labels = case.labels[frame, y[inside], x[inside]]
            assert (labels > 0).all()
            found.append((labels == number + 1).mean())
        assert np.mean(found) > 0.9  # one character may stand before another


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_is_the_right_scene_around_the_characters(drawn: dict[str, list[SpriteCase]], task: str) -> None:
    """The reference's in animate mode, the driving clip's in replace mode."""
    for case in drawn[task]:
        figure = (case.driving_mask != case.scene.driving.colours[0]).any(-1)
        resting = (case.reference_mask != case.scene.reference.colours[0]).any(-1)[None]
        replaced = case.scene.mode == "replace"
        given = case.driving if replaced else np.broadcast_to(case.reference, case.truth.shape)
        outside = away_from(case.labels > 0, figure if replaced else resting)
        assert outside.mean() > 0.3
        np.testing.assert_array_equal(case.truth[outside], given[outside])
        covered = away_from(case.labels > 0)
        np.testing.assert_array_equal(case.truth[covered], bare(case.scene.truth)[covered])


def test_motions_of_the_test_split_are_never_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []

    def noted(species: str, name: str, frames: int, random: Random) -> Motion:
        seen.append((species, name))
        return make_motion(species, name, frames, random)

    monkeypatch.setattr(cases, "make_motion", noted)
    by_split: dict[str, set[tuple[str, str]]] = {}
    for split in cases.SPLITS:
        for task in TASKS:
            for seed in range(0, 48, 2):
                make_scene(task, seed, split, frames=1)
        by_split[split] = set(seen)
        seen.clear()
    new = {(species, name) for species, names in HELD_OUT.items() for name in names}
    practised = {(species, name) for species, names in PRACTISED.items() for name in names}
    back = {("human", "spin")}  # what an extra reference is for
    assert by_split["train"] == practised | back
    assert by_split["test"] == new | back


@pytest.mark.parametrize("species", HELD_OUT)
def test_exercises_reach_every_angle_of_the_motions_that_are_never_trained(species: str) -> None:
    def angles(name: str) -> np.ndarray:
        motions = [make_motion(species, name, 33, np.random.default_rng(seed)) for seed in range(200)]
        return np.concatenate([motion.angles for motion in motions])

    practised = angles("exercise")
    for name in HELD_OUT[species]:
        new = angles(name)
        assert (new.min(0) >= practised.min(0) - 0.05).all(), name
        assert (new.max(0) <= practised.max(0) + 0.05).all(), name


@pytest.mark.parametrize("name", ["turn", "spin"])
def test_only_a_spin_shows_the_back(name: str) -> None:
    yaws = np.array([make_motion("human", name, 33, np.random.default_rng(seed)).yaw for seed in range(50)])
    assert (np.ptp(yaws, axis=1) > 0.2).all()
    assert (np.cos(yaws).min() < -0.3) == (name == "spin")


def test_an_extra_reference_shows_what_the_first_hides() -> None:
    for seed in SEEDS:
        case = render_case(make_scene("extra", seed))  # of full length: turning round takes time
        (image, mask), hides = case.extras[0], case.scene.hides
        assert hides == ("background", "back")[seed // 2 % 2]
        assert case.hidden.mean() > 0.002
        if hides == "background":
            assert colours_of(mask) == {cases.WHITE}
            uncovered = away_from(case.labels > 0) & case.hidden
            shown = np.broadcast_to(image, case.truth.shape)
            np.testing.assert_array_equal(case.truth[uncovered], shown[uncovered])
            assert (case.reference != image)[case.hidden.any(0)].any(-1).mean() > 0.9
        else:
            assert not case.hidden[~case.scene.facing_away[:, 0]].any()
            assert colours_of(mask) == {cases.BLACK, case.scene.reference.colours[1]}
            assert not case.scene.facing_away[0, 0]
    assert not any(render_case(make_scene(task, 1, frames=1)).hidden.any() for task in TASKS if task != "extra")


@pytest.mark.parametrize("seed", [0, 1])
def test_a_closeup_fills_the_reference_and_changes_nothing_else(seed: int) -> None:
    usual = make_scene("replace", seed, frames=3)
    case, before = render_case(cases.closeup(usual)), render_case(usual)
    rows, columns = np.nonzero((case.reference_mask != cases.BLACK).any(-1))
    assert max(np.ptp(rows), np.ptp(columns)) > 118
    assert min(rows.min(), columns.min(), 127 - rows.max(), 127 - columns.max()) >= 1
    for name in ("truth", "driving", "driving_mask", "labels"):
        np.testing.assert_array_equal(getattr(case, name), getattr(before, name))


@pytest.mark.parametrize("height", [128, 96, 200])
def test_a_label_is_as_large_as_its_part(height: int) -> None:
    """A ball of 20 units: its label covers the pixels that are at least half covered, at every size."""
    part = np.zeros((1, 1, FIELDS))
    part[..., AX] = part[..., BX] = 64.3
    part[..., AY] = part[..., BY] = 60.6
    part[..., RA] = part[..., RB] = 20
    part[..., LABEL] = 3
    _, labels = draw_picture(Picture(part, black(1)), height, height)
    rows, columns = np.nonzero(labels[0] == 3)
    scale = UNITS / height
    assert len(rows) * scale**2 == pytest.approx(np.pi * 20**2, rel=0.01)
    assert ((columns.mean() + 0.5) * scale, (rows.mean() + 0.5) * scale) == pytest.approx((64.3, 60.6), abs=0.1)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_can_be_drawn_at_another_size(task: str) -> None:
    """A wider picture shows more of the scene; the square part of it is unchanged."""
    scene = make_scene(task, 1, frames=2)
    wide, square = render_case(scene, (96, 160)), render_case(scene, (96, 96))
    assert wide.driving.shape == wide.truth.shape == wide.driving_mask.shape == (2, 96, 160, 3)
    assert wide.reference.shape == wide.reference_mask.shape == (96, 160, 3)
    assert wide.labels.shape == wide.hidden.shape == (2, 96, 160)
    np.testing.assert_array_equal(wide.truth[:, :, :96], square.truth)
    whole = (render_case(scene).labels > 0).mean()
    assert (square.labels > 0).mean() == pytest.approx(whole, rel=0.1)


def test_many_cases_are_drawn_as_each_alone() -> None:
    """Pictures of different numbers of parts, and their masks, in one batch."""
    scenes = [make_scene(task, 3, "train", 2) for task in ("two", "animal", "pose")]
    images, labels = draw_pictures([scene.truth for scene in scenes], torch.device("cpu"))
    masks = paint(labels, [scene.driving.colours for scene in scenes])
    for scene, image, label, mask in zip(scenes, images, labels, masks, strict=True):
        alone, its_labels = draw_picture(scene.truth, *cases.SIZE)
        np.testing.assert_array_equal(image.permute(0, 2, 3, 1).numpy(), alone)
        np.testing.assert_array_equal(label.numpy(), its_labels)
        expected = np.array(scene.driving.colours, np.uint8)[its_labels]
        np.testing.assert_array_equal(mask.permute(0, 2, 3, 1).numpy(), expected)


def test_scenes_made_in_processes_are_those_made_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1000")  # a single process is enough here
    found = list(make_scenes([("pose", range(2, 20)), ("two", range(2))], frames=1))
    expected = [("pose", seed) for seed in range(2, 20)] + [("two", 0)] * 2
    assert [(scene.task, scene.seed) for scene in found] == expected
    for scene in (found[0], found[17], found[18]):
        here = make_scene(scene.task, scene.seed, "train", 1)
        np.testing.assert_array_equal(scene.truth.parts, here.truth.parts)
        assert scene.prompt == here.prompt
    first, second = (draw_picture(scene.driving.picture, *cases.SIZE) for scene in found[18:])
    np.testing.assert_array_equal(first[0], second[0])
    assert (first[1] != second[1]).any()  # only the colours of the mask tell these two apart


def test_mask_channels_of_a_batch_are_those_of_the_runtime() -> None:
    """Includes values near the threshold, and colours of no class."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.tensor([0, 100, 225, 226, 255], dtype=torch.uint8)
    masks = normalise_video(levels[torch.randint(5, (2, 13, 3, 32, 48), generator=generator)])
    expected = torch.stack([mask_latents(mask) for mask in masks])
    assert expected.unique().numel() > 10
    torch.testing.assert_close(dataset.mask_channels(masks), expected, rtol=0, atol=0)


def test_recoloured_samples_are_those_of_repainted_masks() -> None:
    """Of the reference and of the driving clip alike; extra references may be none."""
    colours = [*COLOURS.values()]
    labels = torch.randint(8, (2, 5, 32, 32), generator=torch.Generator().manual_seed(0))
    order = torch.tensor([[1, 2, 0, 3, 5, 4], [5, 4, 3, 2, 1, 0]])

    def channels(palettes: list[list[RGB]]) -> Tensor:
        """Label 7 is black."""
        return dataset.mask_channels(normalise_video(paint(labels, [(*palette, (0, 0, 0)) for palette in palettes])))

    # plane 1 + i has the content of plane 1 + order[i]: its character gets the i-th colour
    inverse = order.argsort(1)
    painted = channels([[colours[0], *(colours[1 + i] for i in row)] for row in inverse.tolist()])
    usual, none = channels([colours] * 2), torch.zeros(2, 28, 0, 4, 4)
    others = dict.fromkeys(("latent", "weight", "reference", "driving", "extra", "clip", "text"), none)
    samples = dataset.Samples(reference_mask=usual[:, :, :1], driving_mask=usual, extra_mask=none, **others)
    found = samples.recoloured(order)
    assert (painted != usual).any()
    torch.testing.assert_close(found.driving_mask, painted, rtol=0, atol=0)
    torch.testing.assert_close(found.reference_mask, painted[:, :, :1], rtol=0, atol=0)
    assert found.extra_mask.shape == none.shape


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EngineSet]:
    """A checkpoint of the sprite model before training, and its engines."""
    folder = tmp_path_factory.mktemp("untrained")
    dit, vae = (dict(network.state_dict()) for network in (model.make_dit(), model.make_vae()))
    model.write_checkpoint(folder / "checkpoint", dit, vae)
    make_engines(folder / "checkpoint", folder / "engines", precision="fp32")
    return folder / "checkpoint", open_engines(folder / "engines", "torch")


@pytest.mark.parametrize("task", ["extra", "replace"])
def test_training_sees_what_the_runtime_computes(untrained: tuple[Path, EngineSet], tmp_path: Path, task: str) -> None:
    """Every tensor of a sample against the runtime's, which reads the same case from files; samples are kept in bf16.
    The second case of the batch is another one, so a mixed-up batch dimension shows."""
    checkpoint, engines = untrained
    scenes = [make_scene(task, seed, "train", FRAMES) for seed in (5, 4)]
    rounded = {name: tensor.bfloat16().float() for name, tensor in model.make_vae().state_dict().items()}
    encoding = dataset.Encoding(model.make_vae(rounded), checkpoint / TOKENIZER_FILE, torch.device("cpu"))
    samples = encoding.samples(scenes)
    for number, scene in enumerate(scenes):
        expected, text = runtime_tensors(engines, scene, tmp_path / str(number))
        found = samples.take(torch.tensor([number]))
        for name, tensor in expected.items():
            exact = name.endswith("mask")
            tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-2, "atol": 1e-2}
            torch.testing.assert_close(getattr(found, name)[0], tensor, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
        rows = len(text)
        torch.testing.assert_close(found.text[0, :rows], text, rtol=1e-2, atol=1e-2)
        assert not found.text[0, rows:].any()


def runtime_tensors(engines: EngineSet, scene: Scene, folder: Path) -> tuple[dict[str, Tensor], Tensor]:
    """By the names of `Samples`, and the prompt's encoding, without padding."""
    case = render_case(scene)
    write_case(case, folder)
    segments = {"segment_length": FRAMES, "segment_overlap": 1}
    job = check_request(case_request(folder, size=cases.SIZE, **segments))
    request = job.request
    pairs = [(request.image, request.mask_image), *request.extra_refs]
    references = [load_reference(*pair, window) for pair, window in zip(pairs, job.reference_windows, strict=True)]
    (clip,) = read_clips(job)
    truth = normalise_video(torch.from_numpy(case.truth)).permute(3, 0, 1, 2)
    (text,) = encode_prompts(engines, [request.prompt], None)
    names = ("reference", "reference_mask", "extra", "extra_mask", "driving", "driving_mask")
    shown = encode_references(engines, references)
    still = shown.reference, shown.reference_mask, shown.additional_refs, shown.additional_masks
    tensors = (*still, *encode_driving(engines, clip))
    others = {"clip": clip_features(engines, references[0][0]), "latent": encode_clip(engines, truth)}
    return dict(zip(names, tensors, strict=True)) | others, text


@pytest.mark.parametrize(("additional", "replaced"), [(2, False), (0, True)])
def test_a_batch_through_the_transformer_is_its_rows(additional: int, replaced: bool) -> None:
    dit = DiT(DIT).requires_grad_(False)
    dit.load_state_dict(random_tensors({name: tuple(t.shape) for name, t in dit.state_dict().items()}))
    generator = torch.Generator().manual_seed(1)

    def some(*shape: int) -> Tensor:
        return torch.randn(3, *shape, generator=generator)

    frames, height, width = 2, 8, 12
    shapes: Sequence[tuple[int, ...]] = (
        (16, frames, height, width),
        (16, frames, height // 2, width // 2),
        (16, 1, height, width),
        (28, 1 + frames, height, width),
        (28, frames, height // 2, width // 2),
        (7, DIT.text_dim),
        (257, DIT.clip_dim),
        (4, frames, height, width),
        *([(16, additional, height, width), (28, additional, height, width)] if additional else []),
    )
    batch, times = [some(*shape) for shape in shapes], torch.tensor([3.0, 500.0, 999.25])
    together = dit(DiTInputs(*batch, replace=replaced), times)
    for row, time in enumerate(times.tolist()):
        alone = dit(DiTInputs(*(tensor[row] for tensor in batch), replace=replaced), time)
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1
