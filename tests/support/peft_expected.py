"""Writes `tests/data/peft`: adapters that PEFT itself saved, and the weights that it merged them to.

PEFT needs transformers and accelerate, 150 MB that the tests do not otherwise need, so this was run once:
`pip install peft==0.21.2 transformers accelerate regex psutil`, then `python -m tests.support.peft_expected`.
A small network with the names of a block; values are random, magnitudes and biases are moved off their start.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

DATA = Path(__file__).resolve().parents[1] / "data" / "peft"
LINEARS = {"self_attn.q": (12, 12), "self_attn.k": (12, 12), "ffn.0": (20, 12), "ffn.2": (12, 20)}
CASES: dict[str, dict[str, Any]] = {
    "patterns": {
        "r": 2,
        "lora_alpha": 6,
        "rank_pattern": {r"ffn\.0": 4},
        "alpha_pattern": {"self_attn.q": 1, r"ffn\.\d": 8},
    },
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "alpha_pattern": {"k": 2}},
    "dora": {"r": 2, "lora_alpha": 3, "use_dora": True},
    "bias_all": {"r": 2, "lora_alpha": 4, "bias": "all"},
    "bias_lora_only": {"r": 2, "lora_alpha": 4, "bias": "lora_only"},
    "lora_bias": {"r": 2, "lora_alpha": 5, "lora_bias": True},
    "modules_to_save": {"r": 2, "lora_alpha": 5, "modules_to_save": ["norm3"]},
    "loha": {"r": 3, "alpha": 6, "peft_type": "LOHA"},
    "lokr": {"r": 2, "alpha": 6, "peft_type": "LOKR", "decompose_both": True, "decompose_factor": 4},
    "lokr_full": {"r": 8, "alpha": 2, "peft_type": "LOKR"},
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({x: nn.Linear(12, 12) for x in "qk"})
        self.ffn = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))
        self.norm3 = nn.LayerNorm(12)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv3d(3, 12, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleList([Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def main() -> None:
    import peft

    for i, (case, settings) in enumerate(CASES.items()):
        torch.manual_seed(i)
        network = Network()
        base = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        options = dict(settings)
        kind = {"LOHA": peft.LoHaConfig, "LOKR": peft.LoKrConfig}.get(options.pop("peft_type", ""), peft.LoraConfig)
        targets = ["q", "k", "ffn.0", "ffn.2"] + (["patch_embedding"] if case in ("rslora", "dora") else [])
        model = peft.get_peft_model(network, kind(target_modules=targets, **options))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = parameter.detach().abs() if "magnitude" in name else torch.tensor(0.3)
                parameter.data += 0.3 * scale * torch.randn_like(parameter)
        folder = DATA / case
        model.save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)
        merged = {name: tensor.contiguous() for name, tensor in model.merge_and_unload().state_dict().items()}
        tensors = {f"base.{name}": tensor for name, tensor in base.items()}
        save_file(
            tensors | {f"merged.{name}": tensor for name, tensor in merged.items()}, folder / "merged.safetensors"
        )


if __name__ == "__main__":
    main()
