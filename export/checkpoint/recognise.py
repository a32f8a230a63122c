"""Recognises the network in a weights file by its tensor names, and converts them to the names of the Wan branch.

Fused SAT tensors become views of rows; prefixes are removed; names of Hugging Face, diffusers and llama.cpp are
converted. Unknown names are kept, so that the shape check lists them. Other models of the family, which share most
names, are recognised as such.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from scail2_rt.export.checkpoint import diffusers_names
from scail2_rt.export.checkpoint.foreign_networks import VAE22_SIGN, foreign
from scail2_rt.export.checkpoint.gguf_file import LLAMA_UMT5_SIGN, llama_to_hugging_face
from scail2_rt.export.checkpoint.hf_names import CLIP_SIGN, UMT5_SIGN, clip_view, umt5_view
from scail2_rt.export.checkpoint.sat_names import sat_to_wan
from scail2_rt.export.checkpoint.tensors import Rows, TensorSource, View, shapes_of
from scail2_rt.export.models.precision import Component
from scail2_rt.kernels.errors import InputError

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "transformer.", "")
_SAT_SIGN = re.compile(r"transformer\.layers\.\d+\.(attention\.query_key_value|mlp\.dense_h_to_4h)\.weight")
_SIGNS: dict[Component, re.Pattern[str]] = {
    "dit": re.compile(r"blocks\.\d+\.(self_attn\.[qkvo]\.weight|modulation)|patch_embedding_(pose|mask)\.weight"),
    "vae": re.compile(r"(encoder\.downsamples|decoder\.upsamples)\.\d+\.residual\.\d\.(weight|gamma)"),
    "umt5": re.compile(r"blocks\.\d+\.(attn\.[qkvo]|pos_embedding\.embedding)\.weight"),
    "clip": re.compile(r"(visual\.)?(transformer\.\d+\.attn\.to_qkv\.weight|cls_embedding)"),
}


class Recognised(NamedTuple):
    """A network: its tensors under Wan names without prefix, and the file's naming convention ("SAT", "Wan",
    "diffusers" and so on) and prefix. foreign: description of another model's network, else None."""

    component: Component
    source: TensorSource
    names: str
    prefix: str
    foreign: str | None = None


def recognise(source: TensorSource) -> Recognised | None:
    """Recognise the network in a source; None if it holds no known network."""
    names = tuple(source.keys())
    for prefix in _PREFIXES:
        inner = {name[len(prefix) :]: name for name in names if name.startswith(prefix)}
        if found := _by_names(source, inner):
            component, view, whose = found
            return Recognised(component, view, whose, prefix, foreign(component, shapes_of(view)))
    return None


def _by_names(source: TensorSource, inner: Mapping[str, str]) -> tuple[Component, TensorSource, str] | None:
    """Recognise the network from names without prefix. `inner`: such a name → name in the source."""

    def has(sign: re.Pattern[str]) -> bool:
        return any(sign.fullmatch(name) for name in inner)

    rows = {name: Rows(stored) for name, stored in inner.items()}
    if has(_SAT_SIGN):
        return "dit", _sat_view(source, rows), "SAT"
    if has(diffusers_names.DIT_SIGN):
        return "dit", diffusers_names.dit_view(source, inner), "diffusers"
    if has(VAE22_SIGN):
        return "vae", View(source, rows), "Wan 2.2"
    for component, sign in _SIGNS.items():
        if has(sign):
            return component, View(source, _clip_names(rows) if component == "clip" else rows), "Wan"
    if has(diffusers_names.VAE_SIGN):
        return "vae", diffusers_names.vae_view(source, inner), "diffusers"
    if has(UMT5_SIGN):
        return "umt5", umt5_view(source, inner), "Hugging Face"
    if has(LLAMA_UMT5_SIGN):
        return "umt5", umt5_view(source, {llama_to_hugging_face(n): stored for n, stored in inner.items()}), "llama.cpp"
    if has(CLIP_SIGN):
        return "clip", clip_view(source, inner), "Hugging Face"
    return None


def _sat_view(source: TensorSource, inner: Mapping[str, Rows]) -> View:
    """Return SAT tensors under Wan names; fused ones become views of equal rows. Unknown names are kept."""
    parts: dict[str, Rows] = {}
    for name, whole in inner.items():
        targets = sat_to_wan(name)
        if targets is None or len(targets) == 1:
            parts[targets[0] if targets else name] = whole
            continue
        shape = source.shape(whole.name)
        rows = shape[0] if shape else 1
        if rows % len(targets):
            raise InputError(
                f"{source.files[0] if source.files else 'The checkpoint'}: {whole.name} is {list(shape)}, but its "
                f"first dimension must be a multiple of {len(targets)}, because it stacks {', '.join(targets)}. Get "
                "the file again."
            )
        each = rows // len(targets)
        parts |= {target: Rows(whole.name, i * each, (i + 1) * each) for i, target in enumerate(targets)}
    return View(source, parts)


def _clip_names(inner: Mapping[str, Rows]) -> dict[str, Rows]:
    """Return the visual tower's tensors with their `visual.` prefix; a text tower in the same file is ignored."""
    if not any(name.startswith("visual.") for name in inner):
        return {name if name == "log_scale" else f"visual.{name}": rows for name, rows in inner.items()}
    return {name: rows for name, rows in inner.items() if name.startswith("visual.") or name == "log_scale"}
