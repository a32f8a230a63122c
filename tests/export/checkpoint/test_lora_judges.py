"""Every kind of LoRA gives the same weights as `peft` and `lycoris-lora`.

LyCORIS runs in the test. PEFT's results were computed once by `tests/support/peft_expected.py`; its files are the
input.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scail2_rt.export.checkpoint.lora import LoRASpec, apply_loras, parse_lora
from scail2_rt.export.checkpoint.tensors import MappingSource

PEFT = Path(__file__).resolve().parents[2] / "data" / "peft"
LINEAR, CONVOLUTION = "blocks.0.ffn.0", "patch_embedding"
SHAPES = {LINEAR: (24, 16), "blocks.0.self_attn.q": (16, 16), CONVOLUTION: (16, 6, 1, 2, 2)}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def base() -> MappingSource:
    return MappingSource(
        {f"{name}.weight": noise(*shape, seed=i + 90) for i, (name, shape) in enumerate(SHAPES.items())}
        | {f"{name}.bias": noise(shape[0], seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    )


@pytest.mark.parametrize("case", sorted(path.name for path in PEFT.iterdir()))
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_peft(case: str, strength: float) -> None:
    tensors = load_file(PEFT / case / "merged.safetensors")
    base = {name[5:]: tensor for name, tensor in tensors.items() if name.startswith("base.")}
    merged = {name[7:]: tensor for name, tensor in tensors.items() if name.startswith("merged.")}
    fused = apply_loras(MappingSource(base), [parse_lora(f"{PEFT / case}:{strength}")])
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == fused.touched - ({"patch_embedding.bias"} - changed)
    for name in base:  # every kind is a straight line from the checkpoint to PEFT's weights
        expected = base[name] + strength * (merged[name] - base[name])
        torch.testing.assert_close(fused.get(name), expected, atol=2e-6, rtol=1e-5)
    assert fused.report[0].alpha == "from adapter_config.json"


def judge(algorithm: str, module: str, base: MappingSource, **options: object) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors that LyCORIS would save for a module, and the weight that it computes with."""
    modules = pytest.importorskip("lycoris.modules", reason="lycoris-lora is not installed")
    kind = {"lora": modules.LoConModule, "lokr": modules.LokrModule, "loha": modules.LohaModule}[algorithm]
    rows, columns, *window = SHAPES[module]
    plain: nn.Module = nn.Linear(columns, rows)
    if window:
        plain = nn.Conv3d(columns, rows, tuple(window), tuple(window))
    with torch.no_grad():
        plain.weight.copy_(base.get(f"{module}.weight"))
        adapter = kind("x", plain, **{"lora_dim": 4, "alpha": 2, **options})
        for i, (name, parameter) in enumerate(adapter.named_parameters()):
            if "org_module" not in name:
                start = parameter.data if name == "dora_scale" else 0
                parameter.data = start + 0.3 * noise(*parameter.shape, seed=i)
        picture = torch.eye(columns) if not window else torch.eye(columns * 4).view(-1, columns, 1, 2, 2)
        weight = (adapter(picture) - plain.bias.view(1, -1, *[1] * (picture.dim() - 2))).flatten(1).T
        saved = {name: tensor.detach().clone() for name, tensor in adapter.custom_state_dict().items()}
    return saved, weight.reshape(base.shape(f"{module}.weight"))


CASES = {
    "plain": ("lora", LINEAR, {}),
    "plain, rank-stabilised": ("lora", LINEAR, {"rs_lora": True}),
    "plain, alpha 0": ("lora", LINEAR, {"alpha": 0}),
    "convolution": ("lora", CONVOLUTION, {}),
    "convolution with a core": ("lora", CONVOLUTION, {"use_tucker": True}),
    "DoRA": ("lora", LINEAR, {"weight_decompose": True}),
    "DoRA of a square matrix": ("lora", "blocks.0.self_attn.q", {"weight_decompose": True}),
    "DoRA by input": ("lora", LINEAR, {"weight_decompose": True, "wd_on_out": False}),
    "DoRA by input of a square matrix": (
        "lora",
        "blocks.0.self_attn.q",
        {"weight_decompose": True, "wd_on_out": False},
    ),
    "DoRA of a convolution": ("lora", CONVOLUTION, {"weight_decompose": True}),
    "DoRA of a convolution by input": ("lora", CONVOLUTION, {"weight_decompose": True, "wd_on_out": False}),
    "LoKr, full": ("lokr", LINEAR, {"full_matrix": True}),
    "LoKr, second in parts": ("lokr", LINEAR, {"lora_dim": 1, "alpha": 3}),
    "LoKr, both in parts": ("lokr", LINEAR, {"lora_dim": 1, "alpha": 3, "decompose_both": True}),
    "LoKr, another factor": ("lokr", LINEAR, {"lora_dim": 2, "factor": 2}),
    "LoKr with magnitude": ("lokr", LINEAR, {"full_matrix": True, "weight_decompose": True}),
    "LoKr of a convolution": ("lokr", CONVOLUTION, {"full_matrix": True}),
    "LoKr of a convolution in parts": ("lokr", CONVOLUTION, {"lora_dim": 1, "alpha": 3}),
    "LoKr of a convolution with a core": ("lokr", CONVOLUTION, {"lora_dim": 1, "alpha": 3, "use_tucker": True}),
    "LoHa": ("loha", LINEAR, {}),
    "LoHa with magnitude": ("loha", LINEAR, {"weight_decompose": True}),
    "LoHa of a convolution": ("loha", CONVOLUTION, {}),
    "LoHa of a convolution with a core": ("loha", CONVOLUTION, {"use_tucker": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_lycoris(base: MappingSource, tmp_path: Path, case: str) -> None:
    algorithm, module, options = CASES[case]
    saved, expected = judge(algorithm, module, base, **options)
    if "both" in case:
        assert {"lokr_w1_a", "lokr_w2_a"} <= set(saved)
    names = {
        "diffusion_model.{m}": module,
        "lora_unet_{m}": module.replace(".", "_"),
        "lycoris_{m}": module.replace(".", "_").replace("self_attn_q", "attn1_to_q").replace("ffn_0", "ffn_net_0_proj"),
    }
    for pattern, name in names.items():
        tensors = {f"{pattern.format(m=name)}.{key}": tensor.contiguous() for key, tensor in saved.items()}
        save_file(tensors, tmp_path / "l.safetensors")
        fused = apply_loras(base, [LoRASpec(tmp_path / "l.safetensors")])
        assert fused.touched == {f"{module}.weight"}
        torch.testing.assert_close(fused.get(f"{module}.weight"), expected, atol=3e-6, rtol=1e-5)
        half = apply_loras(base, [LoRASpec(tmp_path / "l.safetensors", 0.5)]).get(f"{module}.weight")
        start = base.get(f"{module}.weight")
        torch.testing.assert_close(half, start + 0.5 * (expected - start), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("spelling", ["dora_scale", "magnitude", "lora_magnitude_vector"])
@pytest.mark.parametrize("suffix", ["", ".weight", ".default", ".default.weight"])
def test_spellings_of_a_magnitude(base: MappingSource, tmp_path: Path, spelling: str, suffix: str) -> None:
    if suffix and spelling != "lora_magnitude_vector":
        pytest.skip("PEFT's alone has a suffix")
    saved, expected = judge("lora", LINEAR, base, weight_decompose=True)
    tensors = {f"{LINEAR}.{name}": tensor for name, tensor in saved.items() if name != "dora_scale"}
    magnitude = saved["dora_scale"] if spelling == "dora_scale" else saved["dora_scale"].flatten()
    save_file(tensors | {f"{LINEAR}.{spelling}{suffix}": magnitude.contiguous()}, tmp_path / "l.safetensors")
    fused = apply_loras(base, [LoRASpec(tmp_path / "l.safetensors")])
    torch.testing.assert_close(fused.get(f"{LINEAR}.weight"), expected, atol=3e-6, rtol=1e-5)


def test_fused_projections_are_cut_by_rows(tmp_path: Path) -> None:
    """LoKr, LoHa and DoRA for `to_qkv` of diffusers equal those of the stacked matrix."""
    parts = {f"blocks.0.self_attn.{x}.weight": noise(16, 16, seed=i) for i, x in enumerate("qkv")}
    stacked = torch.cat(list(parts.values()))
    w1, w2, a, b = noise(12, 4), noise(4, 4, seed=1), noise(48, 2, seed=2), noise(2, 16, seed=3)
    name = "transformer.blocks.0.attn1.to_qkv"
    trained = stacked + b.T.new_tensor(1.0) * (a @ b)
    magnitude = noise(48, seed=4).abs()
    cases = [
        ({"lokr_w1": w1, "lokr_w2": w2}, stacked + torch.kron(w1, w2)),
        ({"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}, stacked + (a @ b) ** 2),
        (
            {"lora_B.weight": a, "lora_A.weight": b, "lora_magnitude_vector": magnitude},
            trained * (magnitude / trained.norm(dim=1))[:, None],
        ),
    ]
    for tensors, expected in cases:
        save_file({f"{name}.{key}": tensor.clone() for key, tensor in tensors.items()}, tmp_path / "l.safetensors")
        fused = apply_loras(MappingSource(parts), [LoRASpec(tmp_path / "l.safetensors")])
        torch.testing.assert_close(torch.cat([fused.get(part) for part in parts]), expected, atol=2e-6, rtol=1e-5)
