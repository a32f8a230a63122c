"""Every checkpoint layout gives the same tensors, read lazily; every broken checkpoint is refused with one sentence."""

import dataclasses
import itertools
import json
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from scail2_rt.export.checkpoint.derive import dit_shapes, vae_shapes
from scail2_rt.export.checkpoint.open import Checkpoint, open_checkpoint
from scail2_rt.export.checkpoint.random_checkpoint import (
    CLIP_FILE,
    PRESETS,
    SAT_FILE,
    UMT5_FILE,
    VAE_FILE,
    random_tensor,
)
from scail2_rt.export.checkpoint.tensors import MappingSource, MergedSource, open_safetensors, open_torch
from scail2_rt.kernels.errors import InputError
from tests.support.repackaged import Tensors, assert_same, refused, tensors_of


class Payload:
    """An object that pickles to a call of `os.system` which creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(scope="session")
def wan(opened: Checkpoint) -> Mapping[str, Tensors]:
    """The tiny checkpoint's tensors in memory, by component, under Wan names."""
    return {component: tensors_of(source) for component, source in opened.sources.items()}


@pytest.fixture
def official(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may change."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "official"))


@pytest.fixture
def beside(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A folder with everything but the transformer."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "beside"))
    shutil.rmtree(folder / "model")
    return folder


class TestOfficialFolder:
    def test_fused_tensors_are_cut_into_the_wan_ones(self, opened):
        shapes = dit_shapes(PRESETS["tiny"].dit)
        assert_same(opened.sources["dit"], {name: random_tensor("dit", name, shapes[name], 0) for name in shapes})

    def test_golden_sat_checkpoint_equals_the_golden_weights(self, golden):
        weights = load_file(golden / "dit/a_weights.safetensors")
        hankel = load_file(golden / "dit/img_emb_proj1_hankel.safetensors")["hankel"]
        index = torch.arange(1280)
        weights["img_emb.proj.1.weight"] = hankel[index[:, None] + index].bfloat16()
        source = open_checkpoint(golden / "checkpoint/sat_tiny", components=("dit",)).sources["dit"]
        assert_same(source, weights)

    def test_every_file_counts(self, opened, tiny_checkpoint):
        names = {str(file.relative_to(tiny_checkpoint)) for file in opened.files}
        assert names == {SAT_FILE, VAE_FILE, UMT5_FILE, CLIP_FILE, "umt5-xxl/tokenizer.json"}
        assert opened.tokenizer == tiny_checkpoint / "umt5-xxl/tokenizer.json"

    def test_slices_of_a_mapped_tensor_are_not_copies(self, opened):
        parts = [opened.sources["dit"].get(f"blocks.0.self_attn.{name}.weight") for name in "qkv"]
        steps = [later.data_ptr() - part.data_ptr() for part, later in itertools.pairwise(parts)]
        assert steps == [parts[0].nbytes] * 2

    @pytest.mark.parametrize("inside", ["model", SAT_FILE])
    def test_paths_inside_the_folder_find_the_rest(self, tiny_checkpoint, inside):
        assert open_checkpoint(tiny_checkpoint / inside).config == open_checkpoint(tiny_checkpoint).config

    def test_only_the_wanted_components_are_opened(self, official):
        for file in (VAE_FILE, UMT5_FILE, CLIP_FILE):
            (official / file).unlink()
        checkpoint = open_checkpoint(official, components=("dit",))
        assert set(checkpoint.sources) == {"dit"}
        assert (checkpoint.config.vae, checkpoint.tokenizer) == (None, None)

    def test_names_of_components_do_not_matter(self, official, opened):
        (official / VAE_FILE).rename(official / "something.pth")
        (official / UMT5_FILE).rename(official / "umt5-xxl/anything.pt")
        assert open_checkpoint(official).config == opened.config

    def test_official_loras_in_the_folder_do_not_disturb(self, official, opened):
        name = "model.diffusion_model.transformer.layers.0.attention.dense.lora_layer.down.weight"
        state = {"module": {name: torch.ones(4, 256)}, "np_rng_state": np.random.default_rng(0).integers(9, size=5)}
        torch.save(state, official / "model/bias-aware-dpo-lora.pt")
        assert open_checkpoint(official).config == opened.config
        assert list(open_torch(official / "model/bias-aware-dpo-lora.pt").keys()) == [name]

    def test_random_states_of_numpy_are_tolerated(self, official, opened):
        content = torch.load(official / SAT_FILE, weights_only=True)
        torch.save({**content, "np_rng_state": np.random.RandomState(0).get_state()}, official / SAT_FILE)
        assert open_checkpoint(official).config == opened.config

    @pytest.mark.parametrize("file", [VAE_FILE, UMT5_FILE, CLIP_FILE])
    def test_a_missing_component_is_named_with_its_place(self, official, file):
        (official / file).unlink()
        message = refused(official)
        assert "not complete" in message
        assert str(official / file) in message

    @pytest.mark.parametrize(
        ("latest", "said"), [("7", "there is no folder"), ("../../x", "there is no folder"), ("", "there is no folder")]
    )
    def test_latest_must_name_a_folder(self, official, latest, said):
        (official / "model/latest").write_text(latest)
        assert said in refused(official)

    def test_the_folder_must_hold_one_file(self, official):
        shutil.copy(official / SAT_FILE, official / "model/1/second.pt")
        assert "found: fsdp2_rank_0000_checkpoint.pt, second.pt" in refused(official)
        for file in (official / "model/1").iterdir():
            file.unlink()
        assert "found: none" in refused(official)

    def test_a_fused_tensor_must_divide(self, official):
        content = torch.load(official / SAT_FILE, weights_only=True)
        name = "model.diffusion_model.transformer.layers.1.cross_attention.key_value.bias"
        content["module"][name] = torch.zeros(511)
        torch.save(content, official / SAT_FILE)
        assert f"{name} is [511], but its first dimension must be a multiple of 2" in refused(official)


class TestWanKeys:
    @pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "model."])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_prefixes_and_types(self, beside, wan, prefix, dtype):
        file = beside / "scail2.safetensors"
        stored = {name: tensor.to(dtype) for name, tensor in wan["dit"].items()}
        save_file({prefix + name: tensor for name, tensor in stored.items()}, file)
        for path in (file, beside):
            assert_same(open_checkpoint(path).sources["dit"], stored)

    @pytest.mark.parametrize("index", [True, False])
    def test_shards(self, beside, wan, index):
        names = sorted(wan["dit"])
        shards = {f"model-{i + 1:05}-of-00003.safetensors": names[i::3] for i in range(3)}
        for shard, members in shards.items():
            save_file({name: wan["dit"][name] for name in members}, beside / shard)
        paths = [beside, beside / next(iter(shards))]
        if index:
            weight_map = {name: shard for shard, members in shards.items() for name in members}
            (beside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
            paths.append(beside / "model.safetensors.index.json")
        for path in paths:
            checkpoint = open_checkpoint(path)
            assert_same(checkpoint.sources["dit"], wan["dit"])
            assert len(checkpoint.sources["dit"].files) == 3
        (beside / next(iter(shards))).unlink()
        assert ("is not beside it" if index else "2 of the 3 shards") in refused(beside)

    def test_a_damaged_index_is_refused(self, beside):
        (beside / "model.safetensors.index.json").write_text("{}")
        assert "shard index" in refused(beside / "model.safetensors.index.json")

    def test_a_pth_with_wan_keys(self, beside, wan):
        torch.save({"state_dict": wan["dit"]}, beside / "dit.pth")
        assert_same(open_checkpoint(beside / "dit.pth").sources["dit"], wan["dit"])

    def test_components_as_safetensors_in_subfolders(self, tmp_path, wan, tiny_checkpoint):
        for component, folder in (("dit", "."), ("vae", "vae"), ("umt5", "text_encoders"), ("clip", "clip_vision")):
            (tmp_path / folder).mkdir(exist_ok=True)
            save_file(wan[component], tmp_path / folder / "weights.safetensors")
        (tmp_path / "tokenizer").mkdir()
        shutil.copy(tiny_checkpoint / "umt5-xxl/tokenizer.json", tmp_path / "tokenizer")
        checkpoint = open_checkpoint(tmp_path / "weights.safetensors")
        for component, source in checkpoint.sources.items():
            assert_same(source, wan[component])
        assert checkpoint.tokenizer == tmp_path / "tokenizer/tokenizer.json"

    def test_a_clip_tower_without_prefix_or_with_a_text_tower(self, beside, wan, tmp_path):
        save_file(wan["dit"], beside / "dit.safetensors")
        bare = {name.removeprefix("visual."): tensor for name, tensor in wan["clip"].items() if name != "log_scale"}
        save_file(bare, tmp_path / "bare.safetensors")
        both = {**wan["clip"], "textual.token_embedding.weight": torch.zeros(4, 4)}
        save_file(both, tmp_path / "both.safetensors")
        for name, wanted in (("bare", set(wan["clip"]) - {"log_scale"}), ("both", set(wan["clip"]))):
            source = open_checkpoint(beside, clip=tmp_path / f"{name}.safetensors").sources["clip"]
            assert set(source.keys()) == wanted

    def test_explicit_paths_override_the_search(self, official, wan, tmp_path):
        changed = {name: tensor + 1 for name, tensor in wan["vae"].items()}
        save_file(changed, tmp_path / "other_vae.safetensors")
        shutil.copytree(official / "umt5-xxl", tmp_path / "moved")
        checkpoint = open_checkpoint(
            official, vae=tmp_path / "other_vae.safetensors", umt5=tmp_path / "moved", tokenizer=tmp_path / "moved"
        )
        assert_same(checkpoint.sources["vae"], changed)
        assert checkpoint.sources["umt5"].files == (tmp_path / "moved" / Path(UMT5_FILE).name,)
        assert checkpoint.tokenizer == tmp_path / "moved/tokenizer.json"

    def test_overrides_must_hold_what_they_are_given_for(self, official, tmp_path):
        assert "given as the CLIP tower, but it holds a VAE" in refused(official, clip=official / VAE_FILE)
        assert "no VAE at" in refused(official, vae=tmp_path / "nowhere.pth")
        (tmp_path / "notes.txt").write_text("hello")
        assert "is not a weights file" in refused(official, vae=tmp_path / "notes.txt")
        assert "must hold one set of weights" in refused(official, vae=official)

    def test_two_candidates_ask_for_a_choice(self, official, wan):
        save_file(wan["vae"], official / "vae_copy.safetensors")
        message = refused(official)
        assert "several files with a VAE (Wan2.1_VAE.pth, vae_copy.safetensors)" in message
        assert open_checkpoint(official, vae=official / VAE_FILE).sources["vae"].files == (official / VAE_FILE,)


class TestHeadWidth:
    def write(self, folder: Path, tensors: Tensors, settings: dict[str, object] | None) -> Path:
        save_file(tensors, folder / "dit.safetensors")
        if settings is not None:
            (folder / "config.json").write_text(json.dumps(settings))
        return folder / "dit.safetensors"

    @pytest.mark.parametrize(
        ("settings", "heads"),
        [
            (None, 2),
            ({"num_heads": 4}, 4),
            ({"head_dim": 32}, 8),
            ({"num_heads": 4, "dim": 256}, 4),
            ({"num_heads": 4, "dim": 1024}, 2),  # speaks of another network
        ],
    )
    def test_config_json_beside_the_file(self, tmp_path, wan, settings, heads):
        file = self.write(tmp_path, wan["dit"], settings)
        dit = open_checkpoint(file, components=("dit",)).config.dit
        assert dit is not None
        assert dit.heads == heads

    def test_clip_heads_need_the_width_named(self, beside, wan):
        save_file(wan["dit"], beside / "dit.safetensors")
        (beside / "config.json").write_text('{"num_heads": 8, "dim": 160}')
        config = open_checkpoint(beside).config
        assert config.clip is not None
        assert config.dit is not None
        assert (config.clip.heads, config.dit.heads) == (8, 2)

    def test_metadata_of_the_file_comes_first(self, tmp_path, wan):
        (tmp_path / "config.json").write_text('{"num_heads": 4}')
        save_file(wan["dit"], tmp_path / "dit.safetensors", {"config": '{"num_heads": 8}'})
        dit = open_checkpoint(tmp_path, components=("dit",)).config.dit
        assert dit is not None
        assert dit.heads == 8

    @pytest.mark.parametrize(("text", "said"), [("{", "cannot be read as JSON"), ("[]", "is not a JSON object")])
    def test_a_damaged_config_is_named(self, tmp_path, wan, text, said):
        file = self.write(tmp_path, wan["dit"], None)
        (tmp_path / "config.json").write_text(text)
        assert said in refused(file, components=("dit",))


class TestRefusals:
    def test_nothing_there(self, tmp_path):
        assert "There is no checkpoint at" in refused(tmp_path / "nowhere")
        assert "found nothing. Give the official folder" in refused(tmp_path)

    def test_unknown_layouts_say_what_was_found(self, tmp_path):
        save_file({"unet.conv_in.weight": torch.zeros(4)}, tmp_path / "sd.safetensors")
        (tmp_path / "unet").mkdir()
        assert "found sd.safetensors, unet/. Give" in refused(tmp_path)
        assert "holds no SCAIL-2 network: it has 1 tensor, such as unet.conv_in.weight" in refused(
            tmp_path / "sd.safetensors"
        )
        (tmp_path / "a.txt").write_text("x")
        assert "is not a weights file" in refused(tmp_path / "a.txt")

    def test_a_part_is_no_checkpoint(self, official):
        assert "holds a VAE. Give the file or folder with the transformer" in refused(official / VAE_FILE)
        assert open_checkpoint(official / VAE_FILE, components=("vae",)).config.vae is not None

    def test_missing_and_misshapen_tensors_name_the_file(self, tmp_path, wan):
        tensors = {**wan["dit"], "blocks.1.ffn.2.weight": torch.zeros(256, 511)}
        del tensors["blocks.0.norm3.bias"]
        save_file(tensors, tmp_path / "dit.safetensors")
        message = refused(tmp_path, components=("dit",))
        assert message.startswith(f"The transformer in {tmp_path / 'dit.safetensors'}: 2 tensors do not fit")
        assert "blocks.0.norm3.bias is missing (expected [256])" in message
        assert "blocks.1.ffn.2.weight is [256, 511] (expected [256, 512])" in message

    def test_parts_must_fit_together(self, official, tmp_path, wan):
        smaller = {name: tensor[..., :48].contiguous() for name, tensor in wan["umt5"].items() if tensor.ndim == 2}
        smaller |= {name: tensor[:48].contiguous() for name, tensor in wan["umt5"].items() if tensor.ndim == 1}
        smaller |= {
            n: wan["umt5"][n][:48].contiguous() for n in wan["umt5"] if n.endswith(("attn.o.weight", "fc2.weight"))
        }
        smaller |= {n: wan["umt5"][n] for n in wan["umt5"] if "pos_embedding" in n}
        save_file(smaller, tmp_path / "umt5.safetensors")
        assert "text of width 64, but the umT5 encoder gives 48" in refused(
            official, umt5=tmp_path / "umt5.safetensors"
        )

    def test_clip_and_vae_must_fit_the_transformer(self, official, tmp_path):
        other = dataclasses.replace(PRESETS["tiny"].dit, clip_dim=80)
        save_file({name: torch.zeros(shape) for name, shape in dit_shapes(other).items()}, tmp_path / "dit.safetensors")
        vae = dataclasses.replace(PRESETS["tiny"].vae, z_dim=4)
        other_vae = tmp_path / "elsewhere/vae/weights.safetensors"
        other_vae.parent.mkdir(parents=True)
        save_file({name: torch.zeros(shape) for name, shape in vae_shapes(vae).items()}, other_vae)
        parts = {
            "vae": official / VAE_FILE,
            "umt5": official / UMT5_FILE,
            "clip": official / CLIP_FILE,
            "tokenizer": official / "umt5-xxl",
        }
        assert "CLIP features of width 80, but the tower gives 160" in refused(tmp_path / "dit.safetensors", **parts)
        assert "16 latent channels, but the VAE has 4" in refused(official, vae=other_vae)

    @pytest.mark.parametrize("kept", [0, 3, 100, 5000, 0.5, 0.999])
    @pytest.mark.parametrize("file", [SAT_FILE, VAE_FILE])
    def test_truncated_pickles(self, official, file, kept):
        data = (official / file).read_bytes()
        (official / file).write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
        message = refused(official)
        assert str(official / file) in message
        assert re.search("truncated or damaged|is empty|neither a PyTorch", message)

    @pytest.mark.parametrize("kept", [0, 5, 100, 20_000, 0.5, -1])
    def test_truncated_safetensors(self, beside, wan, kept):
        file = beside / "dit.safetensors"
        save_file(wan["dit"], file)
        data = file.read_bytes()
        file.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
        assert "truncated" in refused(file)

    @pytest.mark.parametrize(
        "header",
        [
            b"not json",
            b"[]",
            b'{"x": 1}',
            b'{"x": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}}',
            b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
            b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
            b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        ],
    )
    def test_damaged_safetensors_headers(self, tmp_path, header):
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
        with pytest.raises(InputError, match="damaged"):
            open_safetensors([tmp_path / "x.safetensors"])

    def test_a_pickle_with_code_is_refused_and_does_not_run(self, official, tmp_path):
        content = torch.load(official / SAT_FILE, weights_only=True)
        torch.save({**content, "extra": Payload(tmp_path / "ran")}, official / SAT_FILE)
        message = refused(official)
        assert "was refused" in message
        assert "system" in message
        assert not (tmp_path / "ran").exists()

    def test_a_bare_pickle_is_refused_and_does_not_run(self, official, tmp_path):
        (official / VAE_FILE).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
        assert "was refused: it is an old PyTorch file or a plain pickle" in refused(official)
        assert not (tmp_path / "ran").exists()

    def test_an_old_file_says_how_to_renew_it(self, official, wan):
        torch.save(wan["vae"], official / VAE_FILE, _use_new_zipfile_serialization=False)
        message = refused(official)
        assert 'torch.save(torch.load("Wan2.1_VAE.pth", weights_only=True), "new.pth")' in message

    @pytest.mark.parametrize(
        "damage", [(b"_rebuild_tensor_v2", b"_rebuild_tensor_v9"), (b"ctorch._u", b"\xfftorch._u")]
    )
    def test_a_damaged_pickle_is_refused(self, official, damage):
        data = (official / VAE_FILE).read_bytes()
        (official / VAE_FILE).write_bytes(data.replace(*damage, 1))
        assert "was refused" in refused(official)

    def test_sparse_tensors_cannot_be_mapped(self, tmp_path):
        torch.save({"x": torch.eye(3).to_sparse()}, tmp_path / "sparse.pt")
        with pytest.raises(InputError, match=r"x of .* cannot be memory-mapped"):
            open_torch(tmp_path / "sparse.pt")

    def test_pickles_without_tensors_and_compressed_ones(self, tmp_path, wan):
        torch.save({"epoch": 3}, tmp_path / "state.pt")
        with pytest.raises(InputError, match="holds no named tensors"):
            open_torch(tmp_path / "state.pt")
        torch.save(wan["vae"], tmp_path / "plain.pt")
        packing = zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED)
        with zipfile.ZipFile(tmp_path / "plain.pt") as plain, packing as packed:
            for name in plain.namelist():
                packed.writestr(name, plain.read(name))
        with pytest.raises(InputError, match="cannot be memory-mapped"):
            open_torch(tmp_path / "packed.pt")

    def test_a_torchscript_archive_is_refused(self, tmp_path):
        torch.save({"x": torch.ones(2)}, tmp_path / "script.pt")
        with zipfile.ZipFile(tmp_path / "script.pt", "a") as archive:
            archive.writestr("script/constants.pkl", b"")  # identifies such an archive
        with pytest.raises(InputError, match=r"refused.*TorchScript"):
            open_torch(tmp_path / "script.pt")

    def test_unreadable_paths(self, tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            open_torch(tmp_path / "nowhere.pt")
        with pytest.raises(InputError, match="cannot be read"):
            open_safetensors([tmp_path / "nowhere.safetensors"])


class TestTokenizer:
    def test_spiece_alone_is_not_enough(self, official):
        (official / "umt5-xxl/tokenizer.json").rename(official / "umt5-xxl/spiece.model")
        assert "has only spiece.model, but tokenizer.json is needed" in refused(official)

    def test_none_at_all(self, official):
        (official / "umt5-xxl/tokenizer.json").unlink()
        assert f"There is no tokenizer.json in {official / 'umt5-xxl'}" in refused(official)

    def test_a_file_may_be_given(self, official, tmp_path):
        (official / "umt5-xxl/tokenizer.json").rename(tmp_path / "my.json")
        assert open_checkpoint(official, tokenizer=tmp_path / "my.json").tokenizer == tmp_path / "my.json"

    def test_another_encoders_tokenizer_is_not_taken(self, official):
        (official / "xlm-roberta-large").mkdir()
        (official / "umt5-xxl/tokenizer.json").rename(official / "xlm-roberta-large/tokenizer.json")
        assert "There is no tokenizer.json" in refused(official)


class TestSources:
    def test_strided_shared_and_empty_tensors_of_a_pickle(self, tmp_path):
        base = torch.arange(60, dtype=torch.float32).reshape(6, 10)
        tensors = {"whole": base, "transposed": base.T, "window": base[2:4, 1:9:2], "empty": torch.zeros(0, 3)}
        tensors |= {"scalar": torch.tensor(7), "parameter": torch.nn.Parameter(torch.ones(2)), "bits": base > 9}
        torch.save({"module": tensors, "step": 3}, tmp_path / "mixed.pt")
        assert_same(open_torch(tmp_path / "mixed.pt"), {name: tensor.detach() for name, tensor in tensors.items()})

    def test_unaligned_safetensors(self, tmp_path):
        entry = (
            '{"x":{"dtype":"F32","shape":[2],"data_offsets":[1,9]},"y":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
        )
        header = entry.encode()
        data = b"\5" + np.array([1.5, -2], np.float32).tobytes()
        (tmp_path / "odd.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
        source = open_safetensors([tmp_path / "odd.safetensors"])
        assert source.get("x").tolist() == [1.5, -2]
        assert source.get("y").tolist() == [5]

    def test_a_name_in_two_shards_is_refused(self, tmp_path):
        for name in ("a", "b"):
            save_file({"x": torch.ones(1)}, tmp_path / f"{name}.safetensors")
        with pytest.raises(
            InputError, match=r"tensor x is in more than one of the shards a\.safetensors, b\.safetensors"
        ):
            open_safetensors([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])

    def test_merging_and_mapping(self):
        left = MappingSource({"a": torch.ones(2)}, {"config": "{}"})
        merged = MergedSource([left, MappingSource({"b": torch.zeros(3, dtype=torch.int8)})])
        assert_same(merged, {"a": torch.ones(2), "b": torch.zeros(3, dtype=torch.int8)})
        assert merged.metadata == {"config": "{}"}
        assert merged.files == ()
