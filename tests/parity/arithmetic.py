"""Fixtures that need no network: preparing pixels and masks, RoPE, segments, schedulers, LoRA, checkpoint layouts."""

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch

from scail2_rt.export.checkpoint.derive import (
    clip_config,
    clip_shapes,
    dit_config,
    dit_shapes,
    umt5_config,
    umt5_shapes,
    vae_config,
    vae_shapes,
)
from scail2_rt.export.checkpoint.lora import LoRASpec, apply_loras
from scail2_rt.export.checkpoint.open import open_checkpoint
from scail2_rt.export.checkpoint.sat_names import SAT_PREFIX, sat_to_wan
from scail2_rt.export.checkpoint.tensors import MappingSource
from scail2_rt.kernels.errors import InputError
from scail2_rt.kernels.rope import Rope, multipliers, rotate
from scail2_rt.runtime.core.geometry import plan_segments
from scail2_rt.runtime.masks.palette import mask_latents
from scail2_rt.runtime.pipeline.preprocess import (
    half_resolution,
    normalise_image,
    normalise_video,
    quantise_frames,
    resize_cover,
)
from scail2_rt.runtime.pipeline.schedulers import make_scheduler
from scail2_rt.runtime.pipeline.text import clean_prompt
from tests.parity.fixtures import Fixture, Golden, Row, compare, difference, exact, unknown
from tests.parity.networks import dit_fixture

ROPE, FLOAT_RESIZE, MASK, TRAJECTORY, SIGMAS, LORA = 1e-6, 1e-5, 1e-6, 5e-5, 1e-7, 1e-6
U8_SHARE = 1e-3  # of pixels that may be one level off after a resize of 8-bit frames


def check_preprocess(golden: Golden, fixture: Fixture) -> Iterator[Row]:
    name = fixture.name
    for case in fixture.groups("f32_in", "f32_out"):
        size = fixture[f"{case}.f32_out"].shape[2:]
        yield compare(
            f"{name} {case} float",
            resize_cover(fixture[f"{case}.f32_in"], *size),
            fixture[f"{case}.f32_out"],
            FLOAT_RESIZE,
        )
    for case in fixture.groups("u8_in", "u8_out"):
        expected = fixture[f"{case}.u8_out"]
        ours = resize_cover(fixture[f"{case}.u8_in"], *expected.shape[2:])
        yield compare(f"{name} {case} 8-bit levels", ours, expected, 1)
        yield Row(f"{name} {case} 8-bit share off", (ours != expected).float().mean().item(), U8_SHARE)
    for case in fixture.groups("norm", "half"):
        normed = normalise_video(fixture[f"{case}.u8_in"])
        yield compare(f"{name} {case} norm", normed, fixture[f"{case}.norm"], 0)
        yield compare(f"{name} {case} half", half_resolution(normed), fixture[f"{case}.half"], FLOAT_RESIZE)
    for case in fixture.groups("full28"):
        mask = normalise_video(fixture[f"{case}.u8_in"])
        yield compare(f"{name} {case} full", mask_latents(mask), fixture[f"{case}.full28"], MASK)
        if f"{case}.half28" in fixture:
            half = mask_latents(half_resolution(mask))
            yield compare(f"{name} {case} half", half, fixture[f"{case}.half28"], MASK)
    if "out_u8" in fixture:
        ours = quantise_frames(fixture["in"].expand(3, 1, 1, -1))[0, 0, :, 0]
        yield compare(f"{name}", ours, fixture["out_u8"], 0)
    if "video_path" in fixture:
        yield compare(f"{name} video", normalise_video(fixture["u8"]), fixture["video_path"], 0)
        yield compare(f"{name} image", normalise_image(fixture["u8"]), fixture["image_path"], 0)


def check_threshold(golden: Golden, path: Path) -> Iterator[Row]:
    """The 8-bit levels that count as on, for videos and for images."""
    recorded = golden.json(path)
    levels = torch.arange(257).clamp_max(255).to(torch.uint8)  # 4n+1 frames, one a level
    for route, normalise in (("video", normalise_video), ("image", normalise_image)):
        planes = mask_latents(normalise(levels)[:, None, None, None].expand(-1, 3, 8, 8))
        white = planes[::7].amax((2, 3)).T.flatten()[3:]  # frame 0 stands four times
        on = [level for level in range(256) if white[level] > 0]
        expected = recorded[f"{route}_path_on"]
        yield exact(f"{path.relative_to(golden.root)} {route}", on == expected)
        yield exact(f"{path.relative_to(golden.root)} {route} first", on[0] == recorded[f"{route}_path_first_on"])


def check_rope(golden: Golden, fixture: Fixture) -> Iterator[Row]:
    grid = [int(fixture.metadata[axis]) for axis in "THW"]
    additional, replace = int(fixture.metadata["n_additional_refs"]), fixture.metadata["replace_flag"] is True
    head_dim = int(fixture.metadata.get("head_dim", 128))
    table = multipliers(*grid, head_dim, additional, replace)
    if "token_index" in fixture:
        table = table[fixture["token_index"]]
        expected = torch.complex(fixture["cos"], fixture["sin"])
    else:
        parts = [part for part in ("additional_ref", "ref", "video", "pose") if f"{part}.cos" in fixture]
        expected = torch.cat([torch.complex(fixture[f"{part}.cos"], fixture[f"{part}.sin"]) for part in parts])
    yield compare(f"{fixture.name} cos", table.real, expected.real, ROPE)
    yield compare(f"{fixture.name} sin", table.imag, expected.imag, ROPE)
    if "apply.x" in fixture:
        rope = Rope(table.real.float(), table.imag.float())
        yield compare(f"{fixture.name} apply", rotate(fixture["apply.x"][0], rope)[None], fixture["apply.y"], 10 * ROPE)


def check_segments(golden: Golden, path: Path) -> Iterator[Row]:
    for row in golden.json(path)["rows"]:
        name = f"{path.relative_to(golden.root)} {row['total_frames']}/{row['segment_len']}/{row['overlap']}"
        try:
            segments = plan_segments(row["total_frames"], row["segment_len"], row["overlap"])
            plan: Any = [[s.start, s.valid_end, s.padded_frames, s.overlap] for s in segments]
        except InputError:
            plan = None
        yield exact(name, plan == row.get("plan"))


def check_solver(golden: Golden, fixture: Fixture) -> Iterator[Row]:
    """The scheduler of a file is identified by its schedule, because the file does not name it."""
    k = float(fixture.metadata["k"])
    for case in fixture.metadata["cases"]:
        key, timesteps = case["key"], fixture[f"{case['key']}.timesteps"]
        sigmas = fixture[f"{key}.sigmas"]

        def fits(name: str, case: dict[str, Any] = case, t: torch.Tensor = timesteps, s: torch.Tensor = sigmas) -> bool:
            scheduler = make_scheduler(name, case["steps"], case["shift"])
            whole = all(isinstance(value, int) for value in scheduler.timesteps)
            same = difference(torch.tensor(scheduler.sigmas), s) <= SIGMAS
            return same and whole == (not t.is_floating_point())

        names = [name for name in ("unipc", "dpm++", "euler") if fits(name)]
        if not names:
            yield unknown(f"{fixture.name} {key}: no scheduler has this schedule")
            continue
        scheduler = make_scheduler(names[0], case["steps"], case["shift"])
        yield compare(f"{fixture.name} {key} {names[0]} timesteps", torch.tensor(scheduler.timesteps), timesteps, 0)
        x, trajectory = fixture["x_init"][0], []
        for t in timesteps:
            x = scheduler.step(torch.sin(k * x + t / 1000), x)
            trajectory.append(x)
        yield compare(f"{fixture.name} {key} {names[0]}", torch.stack(trajectory), fixture[f"{key}.traj"], TRAJECTORY)


def check_lora(golden: Golden, fixture: Fixture) -> Iterator[Row]:
    """`X` fused into the base of `X_expected`, compared with the results of the full formula."""
    expected = golden.load(fixture.path.with_name(f"{fixture.path.stem}_expected.safetensors").relative_to(golden.root))
    base = dit_fixture(golden, expected.metadata["base"])
    spec = LoRASpec(fixture.path, float(expected.metadata["strength"]))
    fused = apply_loras(MappingSource(base.weights(), {}), (spec,), partial=False)
    rules = ("complete.", "alpha_over_rank.")
    wanted = {key.partition(".")[2]: value for key, value in expected.tensors.items() if key.startswith(rules)}
    for key, value in wanted.items():
        yield compare(f"{fixture.name} {key}", fused.get(key), value, LORA)
    yield exact(f"{fixture.name} touches only these", set(fused.touched) == set(wanted))


def check_checkpoint_folder(golden: Golden, path: Path) -> Iterator[Row]:
    """A SAT folder: after the key mapping it equals one of the transformers of `dit/`."""
    source = open_checkpoint(path, components=("dit",)).sources["dit"]
    keys = set(source.keys())
    for weights in sorted((golden.root / "dit").glob("*_weights.safetensors")):
        model = dit_fixture(golden, str(weights.relative_to(golden.root)))
        if set(model.tensors) == keys and all(tuple(model[k].shape) == source.shape(k) for k in keys):
            worst = max(difference(source.get(key).float(), model[key].float()) for key in keys)
            yield Row(f"{path.relative_to(golden.root)} = {model.name}", worst, 0)
            return
    yield unknown(f"{path.relative_to(golden.root)}: no transformer of dit/ has these tensors")


_NETWORKS = (
    ("patch_embedding.weight", dit_config, dit_shapes),
    ("encoder.conv1.weight", vae_config, vae_shapes),
    ("token_embedding.weight", umt5_config, umt5_shapes),
    ("visual.cls_embedding", clip_config, clip_shapes),
)


def check_keys(golden: Golden, path: Path) -> Iterator[Row]:
    """Names and shapes of a real network: the sizes derived from them give the same list."""
    name = str(path.relative_to(golden.root))
    listed = {key: tuple(shape) for key, shape in golden.json(path).items()}
    for marker, derive, shapes in _NETWORKS:
        if marker in listed:
            yield exact(name, shapes(derive(listed, {})) == listed)
            return
    if any(key.startswith("model.diffusion_model.mixins.") for key in listed):
        yield exact(name, _as_wan(listed) == dit_shapes(dit_config(_as_wan(listed), {})))
    else:
        yield unknown(name)


def _as_wan(listed: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """SAT names and shapes → Wan names and shapes; a fused tensor is cut evenly along dimension 0."""
    shapes = {}
    for key, shape in listed.items():
        targets = sat_to_wan(key.removeprefix(SAT_PREFIX)) or ()
        shapes.update({target: (shape[0] // len(targets), *shape[1:]) for target in targets})
    return shapes


def check_counts(golden: Golden, path: Path) -> Iterator[Row]:
    """The numbers of tensors and parameters, for each key list beside the file with that number."""
    lists = [json.loads(other.read_text()) for other in path.parent.glob("*.json") if other != path]
    counts = {len(keys) for keys in lists} | {sum(prod(shape) for shape in keys.values()) for keys in lists}
    for key, value in golden.json(path).items():
        yield exact(f"{path.relative_to(golden.root)} {key}", value in counts)


def check_text(golden: Golden, path: Path) -> Iterator[Row]:
    for i, row in enumerate(golden.json(path)["rows"]):
        yield exact(f"{path.relative_to(golden.root)} row {i}", clean_prompt(row["raw"]) == row["clean"])
