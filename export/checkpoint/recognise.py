"""Which network a weights file holds, by its tensor names, and the tensors under the names of the Wan branch.

Fused SAT tensors become views of rows; prefixes go; umT5 and CLIP under Hugging Face's names are renamed. A name that
no table knows stays as it is, so that the check of shapes lists it.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from scail2_rt.export.checkpoint.hf_names import CLIP_SIGN, UMT5_SIGN, clip_view, umt5_view
from scail2_rt.export.checkpoint.sat_names import sat_to_wan
from scail2_rt.export.checkpoint.tensors import Rows, TensorSource, View
from scail2_rt.export.models.precision import Component
from scail2_rt.kernels.errors import InputError

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "")
_SAT_SIGN = re.compile(r"transformer\.layers\.\d+\.(attention\.query_key_value|mlp\.dense_h_to_4h)\.weight")
_SIGNS: dict[Component, re.Pattern[str]] = {
    "dit": re.compile(r"blocks\.\d+\.(self_attn\.[qkvo]\.weight|modulation)|patch_embedding_(pose|mask)\.weight"),
    "vae": re.compile(r"(encoder\.downsamples|decoder\.upsamples)\.\d+\.residual\.\d\.(weight|gamma)"),
    "umt5": re.compile(r"blocks\.\d+\.(attn\.[qkvo]|pos_embedding\.embedding)\.weight"),
    "clip": re.compile(r"(visual\.)?(transformer\.\d+\.attn\.to_qkv\.weight|cls_embedding)"),
}


class Recognised(NamedTuple):
    """A network: its tensors under Wan names without prefix, and whose names ("SAT", "Wan", "Hugging Face") with which
    prefix the file has."""

    component: Component
    source: TensorSource
    names: str
    prefix: str


def recognise(source: TensorSource) -> Recognised | None:
    """Which network a source holds; None when it holds none of them."""
    names = tuple(source.keys())
    for prefix in _PREFIXES:
        inner = {name[len(prefix) :]: name for name in names if name.startswith(prefix)}
        rows = {name: Rows(stored) for name, stored in inner.items()}
        if any(_SAT_SIGN.fullmatch(name) for name in inner):
            return Recognised("dit", _sat_view(source, rows), "SAT", prefix)
        for component, sign in _SIGNS.items():
            if any(sign.fullmatch(name) for name in inner):
                if component == "clip":
                    rows = _clip_names(rows)
                return Recognised(component, View(source, rows), "Wan", prefix)
        if any(UMT5_SIGN.fullmatch(name) for name in inner):
            return Recognised("umt5", umt5_view(source, inner), "Hugging Face", prefix)
        if any(CLIP_SIGN.fullmatch(name) for name in inner):
            return Recognised("clip", clip_view(source, inner), "Hugging Face", prefix)
    return None


def _sat_view(source: TensorSource, inner: Mapping[str, Rows]) -> View:
    """SAT tensors under their Wan names; fused ones become views of equal rows. Unknown names stay as they are."""
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
                f"{source.files[0] if source.files else 'The checkpoint'}: {whole.name} is {list(shape)}; its first "
                f"dimension must divide by {len(targets)}, for it stacks {', '.join(targets)}"
            )
        each = rows // len(targets)
        parts |= {target: Rows(whole.name, i * each, (i + 1) * each) for i, target in enumerate(targets)}
    return View(source, parts)


def _clip_names(inner: Mapping[str, Rows]) -> dict[str, Rows]:
    """The visual tower's tensors with their `visual.` prefix; a text tower in the same file is left out."""
    if not any(name.startswith("visual.") for name in inner):
        return {name if name == "log_scale" else f"visual.{name}": rows for name, rows in inner.items()}
    return {name: rows for name, rows in inner.items() if name.startswith("visual.") or name == "log_scale"}
