"""Scale of a LoRA: its alpha, whether it is rank-stabilised, and where this was found.

Trainers store alpha in one of three places, or not at all (then it equals the rank): beside each pair, in the
`adapter_config.json` of a PEFT folder, or in the safetensors header. The header has it as JSON (`lora_adapter_metadata`
of diffusers), under plain names with or without the network's prefix (`transformer.lora_alpha`, `network_alpha`,
`alpha`), or under kohya's name (`ss_network_alpha`). The scale is alpha/rank; with rsLoRA, alpha/√rank.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scail2_rt.export.checkpoint.tensors import TensorSource
from scail2_rt.kernels.errors import InputError

CONFIG = "adapter_config.json"
_ALPHA = ("lora_alpha", "network_alpha", "ss_network_alpha", "alpha")
_RANK = ("r", "rank", "lora_rank", "network_dim", "ss_network_dim")
_RSLORA = ("use_rslora", "rslora", "rs_lora", "ss_use_rslora")
_PARTS = ("transformer", "unet", "dit", "model", "diffusion_model", "base_model")
_TYPES = ("LORA", "LOHA", "LOKR")
_INITIAL = re.compile(r"pissa|olora|corda|loftq|lora_ga", re.IGNORECASE)  # these also change the checkpoint's weights


@dataclass(frozen=True, slots=True)
class Scale:
    """Factor of a product. alpha None: there is none; origin: where it was found, or why there is none, in words."""

    value: float
    alpha: float | None
    origin: str


@dataclass(frozen=True, slots=True)
class Training:
    """Training settings stored in a file. origin: where alpha was found; dora: it has magnitudes; peft_type: from
    PEFT's configuration, None without one; fault: why alpha is unknown for pairs without an alpha tensor."""

    alpha: float | None = None
    origin: str = "none given, so it is the rank"
    rank: float | None = None
    rslora: bool = False
    dora: bool = False
    peft_type: str | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)  # pattern of module names → alpha
    ranks: Mapping[str, float] = field(default_factory=dict)
    fault: str | None = None

    def scale(self, module: str, rank: int | None, own_alpha: float | None) -> Scale:
        """Return the scale of a product. rank None: it has no rank (LoKr with full matrices). own_alpha: from the
        module's alpha tensor; 0 means the rank, as in the trainers of kohya and LyCORIS.

        Raises InputError if alpha is needed but unknown (`fault`)."""
        if rank is None:
            if self.peft_type != "LOKR" or self.alpha is None or self.rank is None:
                return Scale(1.0, None, "not needed for full matrices")
            stated = _matching(self.ranks, module, self.rank)
            alpha = _matching(self.alphas, module, self.alpha)
            return Scale(alpha / stated, alpha, self.origin)
        if own_alpha is None and self.fault is not None:
            raise InputError(self.fault)
        if own_alpha is not None:
            alpha, origin = own_alpha or float(rank), "from tensors"
        elif self.alpha is None:
            return Scale(1.0, None, self.origin)
        else:
            alpha, origin = _matching(self.alphas, module, self.alpha), self.origin
        return Scale(alpha / (math.sqrt(rank) if self.rslora else rank), alpha, origin)


def config_of(path: Path) -> Path | None:
    """Return the PEFT configuration of a LoRA file: `adapter_config.json` beside `adapter_model.*`, else None."""
    file = path.parent / CONFIG
    return file if path.stem == "adapter_model" and file.is_file() else None


def read_training(path: Path, lora: TensorSource) -> Training:
    """Read the settings from PEFT's configuration, else from the header. Raises InputError if it cannot be read, or for
    a training method that cannot be fused."""
    if (file := config_of(path)) is not None:
        try:
            config = json.loads(file.read_text())
            if not isinstance(config, dict):
                raise TypeError("no JSON object")
            peft_type = str(config.get("peft_type") or "LORA").upper()
            alpha = float(config["alpha" if peft_type in ("LOHA", "LOKR") else "lora_alpha"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file} has no readable alpha ({error}). Correct or remove it.") from error
        return _training(path, config, alpha, f"from {CONFIG}", peft_type)
    found = dict(_header(lora.metadata))
    stated = sorted(found.values(), key=lambda entry: entry[0])  # a header's entries have no defined order
    alphas = {place: value for place, key, value in stated if key in _ALPHA and _number(value) is not None}
    settings = {key: value for _, key, value in found.values()}
    place, value = next(iter(alphas.items()), ("", None))
    training = _training(path, settings, _number(value), f"from header ({place})", None)
    if len({_number(value) for value in alphas.values()}) > 1:
        listed = ", ".join(f"{place} {value}" for place, value in alphas.items())
        fault = f"{path} has different values of alpha in its header ({listed}). Correct the header."
        return replace(training, fault=fault)
    return training


def _training(
    path: Path, settings: Mapping[str, Any], alpha: float | None, origin: str, peft_type: str | None
) -> Training:
    if peft_type is not None and peft_type not in _TYPES:
        raise InputError(
            f"{path} is a PEFT adapter of the kind {peft_type}, not a LoRA, LoHa or LoKr. Merge it with PEFT."
        )
    initial = settings.get("init_lora_weights")
    if isinstance(initial, str) and _INITIAL.match(initial):
        raise InputError(
            f"{path} was initialised with {initial}, which changes the checkpoint's weights. Save it again with PEFT's "
            "path_initial_model_for_weight_conversion."
        )
    rslora = any(_true(settings.get(key)) for key in _RSLORA)
    fault = f"{path} has use_rslora but no alpha, so its scale is unknown. Add lora_alpha to its header."
    given = {} if alpha is None else {"alpha": alpha, "origin": origin}
    return Training(
        rank=next((rank for key in _RANK if (rank := _number(settings.get(key))) is not None), None),
        rslora=rslora,
        dora=_true(settings.get("use_dora")),
        peft_type=peft_type,
        alphas=_patterns(path, settings.get("alpha_pattern")),
        ranks=_patterns(path, settings.get("rank_pattern")),
        fault=fault if rslora and alpha is None else None,
        **given,  # type: ignore[arg-type]
    )


def _header(metadata: Mapping[str, str]) -> Iterator[tuple[str, tuple[str, str, Any]]]:
    """Yield (full name, (place, bare key, value)) of a header's settings. JSON objects are expanded, except kohya's
    (`ss_`: its alpha tensors already include rsLoRA); settings of text encoders are ignored."""
    for key, text in metadata.items():
        value = _json(text)
        whole = not isinstance(value, dict) or key.endswith("_pattern") or key.startswith("ss_")
        entries = ((None, text),) if whole else value.items()
        for inner, setting in entries:
            part, _, bare = str(key if inner is None else inner).rpartition(".")
            if part.rpartition(".")[2] in ("", *_PARTS):
                place = key if inner is None or key.endswith(bare) else f"{key}: {bare}"
                yield (f"{key}/{inner}", (place, bare, setting))


def _json(text: Any) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) and text.lstrip()[:1] in ("{", "[") else text
    except ValueError:
        return text


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and not isinstance(value, bool) else None


def _true(value: Any) -> bool:
    return value is True or str(value).strip().lower() in ("true", "1", "yes")


def _patterns(path: Path, value: Any) -> dict[str, float]:
    value = _json(value)
    if not isinstance(value, dict):
        return {}
    try:
        for pattern in value:
            re.compile(pattern)
        return {str(pattern): float(number) for pattern, number in value.items()}
    except (re.error, TypeError, ValueError) as error:
        raise InputError(f"{path} has an alpha or rank pattern that cannot be read ({error}). Correct it.") from error


def _matching(patterns: Mapping[str, float], module: str, default: float) -> float:
    """Return the number of the first pattern that matches the end of the module's name, as in PEFT."""
    return next((n for pattern, n in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), default)
