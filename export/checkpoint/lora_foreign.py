"""Recognises LoRA files that cannot be fused, and step-distilled LoRAs.

Tensor names identify a file: an adapter of another kind (Stand-In, ControlNet LoRA), another network's LoRA, a
checkpoint. A step-distilled LoRA is recognised by its file name, by its header, or by differences of norms and biases,
which result from subtracting two complete models; it needs few steps and no guidance.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from scail2_rt.export.checkpoint.lora_names import ModuleTensors, has_lora_tensors
from scail2_rt.export.checkpoint.tensors import TensorSource
from scail2_rt.kernels.wording import counted

_ADAPTERS: tuple[tuple[str, re.Pattern[str]], ...] = (  # one such name identifies the file
    (
        "a Stand-In adapter: its pairs act only on the tokens of an identity image, which SCAIL-2 does not have",
        re.compile(r"\.[qkv]_loras?\.(down|up)\.|(?<![a-z])stand[-_]?in(?![a-z])", re.IGNORECASE),
    ),
    (
        "a ControlNet LoRA: it needs a control image in the model's input, which SCAIL-2 does not have",
        re.compile(r"lora_controlnet|controlnet|control_(lora|blocks|adapter|layers|model)|\.reshape_weight$"),
    ),
    ("a LoRA for VACE, which has blocks that SCAIL-2 does not have", re.compile(r"(^|[._])vace_(blocks|patch)")),
    ("an IP-Adapter, not a LoRA", re.compile(r"ip_adapter|image_proj\.|to_[kv]_ip\b")),
    (
        "an OFT or BOFT adapter, which is not supported. Merge it with LyCORIS",
        re.compile(r"\.(oft_(blocks|diag|[rR])|boft_)"),
    ),
    ("an (IA)^3 adapter, which is not supported. Merge it with LyCORIS", re.compile(r"\.(ia3_l|on_input$)")),
    ("a GLoRA, which is not supported. Merge it with LyCORIS", re.compile(r"\.[ab][12]\.weight$")),
    ("a VeRA adapter, which is not supported. Merge it with PEFT", re.compile(r"vera_(lambda|A|B)")),
)
_NETWORKS: tuple[tuple[str, re.Pattern[str]], ...] = (  # used if no name belongs to this transformer
    ("Stable Diffusion", re.compile(r"(down|up|input|output)_blocks|mid(dle)?_block")),
    ("Flux or HunyuanVideo", re.compile(r"(double|single)_blocks|single_transformer_blocks")),
    ("Qwen-Image, LTX-Video, CogVideoX or Stable Diffusion 3", re.compile(r"transformer_blocks|joint_blocks")),
    ("a text encoder", re.compile(r"(^|[._])lora_te\d?_|text_(model|encoder)")),
    ("a language model", re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj")),
)
_WIDTHS = {1536: "Wan 1.3B", 2048: "a Wan of 2B", 3072: "Wan 2.2 5B", 5120: "the 14B models"}

_DISTILLED = re.compile(
    r"light(x2v|ning)|distill|causvid|accvid|fusionx|self[-_ ]?forc|fast[-_ ]?wan|(?<![a-z])(lcm|dmd2?|rcm|turbo|hyper)"
    r"(?![a-z])|(?<![a-z0-9])[1-9]\d?[-_ ]?steps?(?![a-z0-9])",
    re.IGNORECASE,
)
_NO_DESCRIPTION = re.compile(r"^ss_|tag|prompt|caption|dataset|hash|date|step$|epoch", re.IGNORECASE)
_SHORT = 200  # characters; longer values are not descriptions


def foreign_kind(source: TensorSource) -> str | None:
    """Describe a file that cannot be fused as a LoRA into any transformer; None if it may be one."""
    names = list(source.keys())
    for what, sign in _ADAPTERS:
        if any(sign.search(name) for name in (*names, *source.metadata)):
            return what
    if not has_lora_tensors(names):
        networks = sum(name.endswith((".weight", ".bias", ".modulation")) for name in names)
        what = "a checkpoint" if names and 2 * networks >= len(names) else "a file without LoRA tensors"
        return f"{what}, not a LoRA: it has {counted(len(names), 'tensor')}, such as {', '.join(names[:3])}"
    return None


def network_of(names: Iterable[str]) -> str | None:
    """Return the network that a LoRA without any fitting tensor was made for, if its names show it."""
    names = list(names)
    return next((network for network, sign in _NETWORKS if any(sign.search(name) for name in names)), None)


def width_name(width: int) -> str:
    """Describe a model by its width, with its name if known."""
    return f"{width} channels" + (f" ({_WIDTHS[width]})" if width in _WIDTHS else "")


def distilled_by(path: Path, metadata: Mapping[str, str], groups: Iterable[ModuleTensors]) -> str | None:
    """Return how a LoRA is recognised as step-distilled: "name", "header" or "difference tensors"; else None."""
    name = path.parent.name if path.stem == "adapter_model" else path.stem
    if _DISTILLED.search(name):
        return "name"
    for key, value in metadata.items():
        if not _NO_DESCRIPTION.search(key) and len(value) < _SHORT and _DISTILLED.search(f"{key} {value}"):
            return "header"
        if key in ("ss_output_name", "ss_training_comment") and _DISTILLED.search(value):
            return "header"
    norms = biases = False
    for group in groups:
        in_block = group.modules[0].startswith("blocks.")
        norms |= in_block and "norm" in group.modules[0] and "weight" in group.tensors
        biases |= in_block and "norm" not in group.modules[0] and "bias" in group.tensors
    return "difference tensors" if norms and biases else None
