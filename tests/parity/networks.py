"""DiT, VAE, CLIP and umT5 fixtures: the weights become an engine folder, which the runtime runs. Taps inside a stage
are taken from the plain reference model, which must agree as well."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from scail2_rt.engines.engine_set import EngineSet
from scail2_rt.export.models.clip import CLIPVisual
from scail2_rt.export.models.dit import DiT, DiTInputs
from scail2_rt.export.models.umt5 import UMT5Encoder, relative_buckets
from scail2_rt.export.models.vae import VAE
from scail2_rt.runtime.core.geometry import Layout
from scail2_rt.runtime.pipeline.conditioning import encode_ids
from scail2_rt.runtime.pipeline.preprocess import clip_pixels
from scail2_rt.runtime.pipeline.transformer import References, Schedule, Transformer, context_kv
from scail2_rt.runtime.pipeline.vae import decode, encode_clip
from tests.parity.fixtures import Fixture, Golden, Row, compare, difference, exact, unknown

DIT, VAE_TOLERANCE, ENCODER, CLIP_PIXELS = 2e-4, 1e-4, 5e-5, 1e-4


def dit_fixture(golden: Golden, relative: str) -> Fixture:
    """A transformer's weights; the shared CLIP projection is rebuilt from its Hankel vector when it is not stored."""
    fixture = golden.load(relative)
    name = "img_emb.proj.1.weight"
    if name in fixture:
        return fixture
    hankel = golden.with_tensor("dit", "hankel")["hankel"]
    index = torch.arange((len(hankel) + 1) // 2)
    tensors = {**fixture.tensors, name: hankel[index[:, None] + index]}
    return Fixture(fixture.path, fixture.name, tensors, fixture.metadata)


def load_reference(model: nn.Module, weights: Mapping[str, Tensor], strict: bool = True) -> nn.Module:
    model.load_state_dict({name: value.float() for name, value in weights.items()}, strict=strict, assign=True)
    return model.eval()


@contextmanager
def tapped(model: nn.Module, names: Mapping[str, str]) -> Iterator[dict[str, list[Tensor]]]:
    """Outputs (or, for a module name that ends in `<`, first inputs) of named submodules, call by call."""
    taps: dict[str, list[Tensor]] = {tap: [] for tap in names}
    hooks = []
    for tap, name in names.items():
        module = model.get_submodule(name.removesuffix("<"))
        if isinstance(module, nn.ModuleList):
            module = module[-1]

        def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, tap: str = tap, name: str = name) -> None:
            taps[tap].append(inputs[0] if name.endswith("<") else output)

        hooks.append(module.register_forward_hook(keep))
    yield taps
    for hook in hooks:
        hook.remove()


class Recorder:
    """Engines that record the last inputs and outputs of each stage."""

    def __init__(self, engines: EngineSet) -> None:
        self._engines = engines
        self.inputs: dict[str, tuple[Tensor, ...]] = {}
        self.outputs: dict[str, tuple[Tensor, ...]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engines, name)

    def run(self, name: str, *inputs: Tensor, out: Tensor | None = None) -> tuple[Tensor, ...]:
        outputs = self._engines.run(name, *inputs)  # not into `out`, so that recorded tensors are not overwritten
        self.inputs[name], self.outputs[name] = inputs, outputs
        return outputs


def check_dit(golden: Golden, fixture: Fixture) -> Iterator[Row]:
    """One forward pass: through the stages, and through the plain reference."""
    weights = dit_fixture(golden, f"dit/{fixture.metadata['model']}_weights.safetensors")
    references, reference_inputs, t = _dit_inputs(golden, fixture)
    engines = Recorder(golden.engines(dit=weights))
    layout = Layout(*reference_inputs.latent.shape[1:], references.additional_refs.shape[1], reference_inputs.replace)
    contexts = context_kv(engines, [reference_inputs.text], reference_inputs.clip)
    transformer, schedule = Transformer(engines, layout, contexts), Schedule.of(engines, [t])
    transformer.show_references(references)
    transformer.show_driving(reference_inputs.driving, reference_inputs.driving_mask)
    latent, history = (x.to(engines.device) for x in (reference_inputs.latent, reference_inputs.history_mask))
    (velocity,) = transformer.velocities(latent, history, schedule, 0)
    yield compare(fixture.name, velocity, fixture["out"], DIT)
    model = load_reference(DiT(engines.config.dit), weights.weights())
    taps_path = fixture.path.with_name(f"{fixture.path.stem}_taps.safetensors")
    taps = golden.load(taps_path.relative_to(golden.root)) if taps_path.exists() else None
    hooks = {
        tap: _DIT_HOOKS[tap.partition(".")[2]].format(tap[5:].partition(".")[0])
        for tap in (taps.tensors if taps else ())
        if tap.startswith("block")
    }
    with tapped(model, hooks) as seen:
        yield compare(f"{fixture.name} reference", model(reference_inputs, t), fixture["out"], DIT)
    if taps is None:
        return
    text, image = engines.outputs["dit.context"]
    values = {
        "tokens_in": engines.inputs["dit.blocks.0.qkv"][0],
        "time_embedding": schedule.time,
        "time_projection": schedule.modulation,
        "context": torch.cat([image, text])[: taps["context"].shape[1]] if "context" in taps else None,
        "head_out": engines.outputs["dit.head"][0],
        **{
            f"block{i}.{tap}": engines.outputs[f"dit.blocks.{i}.{stage}"][0]
            for i in range(engines.config.dit.layers)
            for tap, stage in (("after_self", "mid"), ("out", "ffn"))
        },
    }
    for tap, expected in taps.tensors.items():
        expected = expected[0] if expected.ndim == 3 and tap != "time_projection" else expected
        expected = expected[layout.video] if tap == "head_out" else expected
        if tap in values:
            yield compare(f"{taps.name} {tap}", values[tap], expected, DIT)
        if tap in seen:
            yield compare(f"{taps.name} {tap} reference", seen[tap][0], expected, DIT)
        if tap not in values and tap not in seen:
            yield unknown(f"{taps.name} {tap}")


_DIT_HOOKS = {
    "norm1_mod": "blocks.{}.self_attn<",
    "self_attn_out": "blocks.{}.self_attn",
    "after_self": "blocks.{}.norm3<",
    "cross_attn_out": "blocks.{}.cross_attn",
    "after_cross": "blocks.{}.norm2<",
    "ffn_out": "blocks.{}.ffn",
    "out": "blocks.{}",
}


def _dit_inputs(golden: Golden, fixture: Fixture) -> tuple[References, DiTInputs, float]:
    x = fixture["in.x"]

    def optional(name: str, *shape: int) -> Tensor:
        return fixture[name] if name in fixture else x.new_zeros(*shape)

    additional = (
        optional("in.additional_ref_latents", 16, 0, *x.shape[2:]),
        optional("in.additional_ref_masks", 28, 0, *x.shape[2:]),
    )
    given = additional if additional[0].shape[1] else (None, None)
    history = optional("in.history_mask", 4, *x.shape[1:])
    clip = golden.with_tensor("dit", "clip_fea")["clip_fea"][0].float()
    named = [fixture[f"in.{name}"] for name in ("ref_latents", "ref_masks", "pose_latents", "driving_masks")]
    reference, reference_mask, driving, driving_mask = named
    whole = DiTInputs(
        x,
        driving,
        reference,
        reference_mask,
        driving_mask,
        fixture["in.context"],
        clip,
        history,
        *given,
        fixture.metadata["replace_flag"] is True,
    )
    return References(reference, reference_mask, *additional), whole, fixture["in.t"].item()


def check_vae(golden: Golden, fixture: Fixture) -> Iterator[Row]:
    """Encoding, decoding, and the decoder's intermediate results, chunk by chunk."""
    weights = golden.with_tensor("vae", "encoder.conv1.weight")
    engines = golden.engines(vae=weights)
    if "video_unclamped" in fixture:
        stream = engines.vae_stream("vae.decode")
        chunks = [stream.step(frame) for frame in fixture["latent"].split(1, dim=1)]
        yield compare(f"{fixture.name} unclamped", torch.cat(chunks, 1), fixture["video_unclamped"], VAE_TOLERANCE)
        video = torch.cat(list(decode(engines, fixture["latent"])), 1)
        yield compare(fixture.name, video, fixture["video"], VAE_TOLERANCE)
        edges = [0, *torch.tensor([chunk.shape[1] for chunk in chunks]).cumsum(0).tolist()]
        yield exact(f"{fixture.name} chunk_frame_edges", edges == fixture.metadata["chunk_frame_edges"])
    elif "video" in fixture:
        yield compare(fixture.name, encode_clip(engines, fixture["video"]), fixture["latent"], VAE_TOLERANCE)
    else:
        yield from _vae_taps(engines, fixture, weights)


def _vae_taps(engines: EngineSet, fixture: Fixture, weights: Fixture) -> Iterator[Row]:
    model = load_reference(VAE(engines.config.vae), weights.weights())
    stream = engines.vae_stream("vae.decode")
    taps = {tap.partition(".")[2] for tap in fixture.tensors if tap.startswith("chunk")} - {"out"}
    with tapped(model, {tap: tap for tap in taps} | {"conv2": "conv2"}) as seen:
        model.decode(fixture["latent"][None])
    frames = fixture["latent"].split(1, dim=1)
    for name, expected in fixture.tensors.items():
        chunk, _, tap = name.partition(".")
        index = int(chunk.removeprefix("chunk")) if tap else 0
        if tap == "out":
            yield compare(f"{fixture.name} {name}", stream.step(frames[index])[None], expected, VAE_TOLERANCE)
        elif name == "conv2":
            yield compare(f"{fixture.name} {name}", torch.cat(seen["conv2"], 2), expected, VAE_TOLERANCE)
        elif tap:
            yield compare(f"{fixture.name} {name}", seen[tap][index], expected, VAE_TOLERANCE)
        elif name != "latent":
            yield unknown(f"{fixture.name} {name}")


def check_clip(golden: Golden, fixture: Fixture) -> Iterator[Row]:
    """The visual tower, or the preparation of its pixels."""
    for prefix in fixture.groups("image", "pixels224"):
        pixels = clip_pixels(fixture[f"{prefix}.image"], 224)
        yield compare(f"{fixture.name} {prefix}", pixels, fixture[f"{prefix}.pixels224"], CLIP_PIXELS)
    if "in.pixels" not in fixture:
        return
    weights = fixture.part("w.")
    engines = golden.engines(clip=weights)
    model = load_reference(CLIPVisual(engines.config.clip), weights.weights(), strict=False)
    expected = fixture["out.penultimate"]
    for i, pixels in enumerate(fixture["in.pixels"]):
        (features,) = engines.run("clip", pixels[None].to(engines.device))
        yield compare(f"{fixture.name} image {i}", features, expected[i], ENCODER)
    yield compare(f"{fixture.name} reference", model(fixture["in.pixels"]), expected, ENCODER)
    wrong = fixture["aux.after_all_blocks"] if "aux.after_all_blocks" in fixture else expected + 1
    yield exact(f"{fixture.name} is not the last block", difference(features, wrong[-1]) > 10 * ENCODER)


def check_umt5(golden: Golden, fixture: Fixture) -> Iterator[Row]:
    """The encoder on token ids, at their true length, and the relative-position buckets."""
    weights = fixture.part("w.")
    engines = golden.engines(umt5=weights)
    config = engines.config.umt5
    ids, mask, expected = fixture["in.ids"], fixture["in.mask"], fixture["out.last_hidden"]
    for i, length in enumerate(fixture["out.seq_lens"].tolist()):
        (encoding,) = encode_ids(engines, [ids[i, :length].tolist()])
        yield compare(f"{fixture.name} prompt {i}", encoding, expected[i, :length], ENCODER)
    model = load_reference(UMT5Encoder(config), weights.weights())
    yield compare(f"{fixture.name} reference", model(ids, mask), expected, ENCODER)
    positions, buckets = fixture["bucket.rel_pos"], fixture["bucket.index"]
    reach = int(positions.abs().max()) + 1
    table = relative_buckets(reach, config.buckets, config.max_distance)
    ours = torch.tensor([table[max(-int(r), 0), max(int(r), 0)] for r in positions])
    yield exact(f"{fixture.name} buckets", torch.equal(ours, buckets.long()))
