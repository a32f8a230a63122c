"""Networks of the same family that do not belong to SCAIL-2. The error says what they are and what to get instead.

They share most tensor names, so a shape check would list hundreds of tensors. The inputs of a transformer (its patch
embeddings, and their numbers of channels) and the structure of a VAE or text encoder identify them.
Sources: Wan-Video/Wan2.1 and Wan2.2 (`model.py`, `vae2_2.py`, `animate`), zai-org/SCAIL (Preview), ali-vilab/VACE.
"""

import re
from collections.abc import Mapping

from scail2_rt.export.models.precision import Component

Shapes = Mapping[str, tuple[int, ...]]

_SCAIL2 = (
    "Use SCAIL-2's transformer: `scail2-rt download DIR` gets the official one; files for ComfyUI have SCAIL_2 in "
    "their names"
)
_VAE = "Use the VAE of Wan 2.1 (16 channels): Wan2.1_VAE.pth, or wan_2.1_vae.safetensors for ComfyUI"
_UMT5 = "Use umT5-XXL: models_t5_umt5-xxl-enc-bf16.pth, or umt5_xxl_*.safetensors or *.gguf for ComfyUI"
VAE22_SIGN = re.compile(
    r"(encoder\.downsamples\.\d+\.downsamples|decoder\.upsamples\.\d+\.upsamples)\.\d+\..+"
    r"|encoder\.down_blocks\.\d+\.resnets\.\d+\.norm1\.gamma"
)
_BY_INPUT = {  # (channels of the patch embedding, whether it has image features) → description
    (16, False): "a text-to-video transformer of Wan (2.1, or 2.2 A14B)",
    (36, False): "the image-to-video transformer of Wan 2.2 (A14B)",
    (36, True): "the image-to-video transformer of Wan 2.1 (I2V)",
    (48, False): "the transformer of Wan 2.2 TI2V-5B",
}


def foreign(component: Component, shapes: Shapes) -> str | None:
    """Describe another model's network (given Wan names) and what to get instead; None if it may be SCAIL-2's."""
    if component == "dit" and (what := _transformer(shapes)):
        return f"{what}, not that of SCAIL-2. {_SCAIL2}"
    if component == "vae" and any(VAE22_SIGN.fullmatch(name) for name in shapes):
        return f"the VAE of Wan 2.2 (48 channels). {_VAE}"
    if component == "umt5" and "blocks.1.norm1.weight" in shapes:
        tables = [name for name in shapes if ".pos_embedding." in name]
        if tables == ["blocks.0.pos_embedding.embedding.weight"]:
            return f"a T5 encoder, not umT5 (one position table for all layers). {_UMT5}"
    return None


def _transformer(shapes: Shapes) -> str | None:
    modules = {re.sub(r"\.\d+\..*|\.(weight|bias)$", "", name).partition(".")[0] for name in shapes}
    if "patch_embedding_mask" in modules:
        return None
    if modules & {"motion_encoder", "face_adapter", "face_encoder", "pose_patch_embedding"}:
        return "the transformer of Wan-Animate"
    if "patch_embedding_pose" in modules:
        return "the transformer of SCAIL-Preview (the first SCAIL: poses, but no masks)"
    if "vace_blocks" in modules or "vace_patch_embedding" in modules:
        return "the transformer of Wan VACE"
    size = shapes.get("patch_embedding.weight", ())
    if len(size) < 2:
        return None
    image = "img_emb" in modules
    return _BY_INPUT.get((size[1], image), f"a transformer of the Wan family with {size[1]} input channels")
