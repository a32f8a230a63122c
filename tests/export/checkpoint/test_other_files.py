"""Intact files of the wrong kind: the error names their kind and the file to get instead, and does not suggest to
download them again. Files with diffusers' names are read."""

import gzip
import json
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from scail2_rt.export.checkpoint.open import Checkpoint, open_checkpoint
from scail2_rt.export.checkpoint.random_checkpoint import CLIP_FILE, SAT_FILE, VAE_FILE, sat_module
from tests.support.command import Run, error_of
from tests.support.repackaged import (
    PREFIX,
    Tensors,
    assert_same,
    diffusers_dit,
    diffusers_vae,
    hugging_face_umt5,
    refused,
    tensors_of,
)

pytest_plugins = ["tests.support.runtime_fixtures"]

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 32800\n"
)
AGAIN = re.compile(r"(download|get|copy)[^.;]* again")


class TestNoWeights:
    @pytest.mark.parametrize("name", ["dit.safetensors", "dit.pth", "dit.gguf"])
    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (POINTER, "is a Git LFS pointer for a file of 32,800 bytes"),
            (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "is a web page (HTML)"),
            (b"\xef\xbb\xbf\n  <!-- x -->\n<html lang='en'>", "is a web page (HTML)"),
            (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML answer of a server"),
            (b'{"error": "Repository not found"}', "a text that begins"),
            (b"Entry not found", "a text that begins 'Entry not found'"),
            (gzip.compress(b"weights", mtime=0), "an archive (gzip)"),
        ],
    )
    def test_named_for_what_it_is(self, tmp_path: Path, name: str, content: bytes, said: str) -> None:
        (tmp_path / name).write_bytes(content)
        message = refused(tmp_path / name)
        assert f"{tmp_path / name} is" in message
        assert said in message
        assert not AGAIN.search(message)

    def test_by_the_command_in_a_folder(self, scail2: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "cloned"))
        (folder / VAE_FILE).write_bytes(POINTER)
        (folder / CLIP_FILE).write_bytes(b"<html><head>")
        message = error_of(scail2("build-engines", folder, "-o", tmp_path / "engines"))
        assert "git lfs pull" in message
        assert "hf download" in message
        shown = scail2("inspect", folder).stdout
        assert "Git LFS pointer" in shown
        assert "web page (HTML)" in shown

    @pytest.mark.parametrize(("kind", "said"), [("F4", "float4"), ("F6_E2M3", "float6")])
    def test_floats_that_nothing_reads(self, scail2: Run, tmp_path: Path, kind: str, said: str) -> None:
        size = 256 * 256 // 2 if kind == "F4" else 256 * 256 * 6 // 8
        entry = {"dtype": kind, "shape": [256, 256], "data_offsets": [0, size]}
        header = json.dumps({"blocks.0.self_attn.q.weight": entry}).encode()
        (tmp_path / "dit.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
        message = error_of(scail2("inspect", tmp_path / "dit.safetensors"))
        assert f"holds {said} weights (type {kind}; tensors: 1)" in message
        assert "Get the fp16, bf16" in message
        assert not AGAIN.search(message)


class TestOtherModels:
    def cases(self, dit: Tensors) -> list[tuple[Tensors, str]]:
        """(tensors, their description)."""
        wan = {name: tensor for name, tensor in dit.items() if not name.startswith("patch_embedding_")}
        text = {name: tensor for name, tensor in wan.items() if "img" not in name}
        pose = {
            "patch_embedding_pose.weight": torch.zeros(256, 16, 1, 2, 2),
            "patch_embedding_pose.bias": torch.zeros(256),
        }

        def taking(channels: int) -> Tensors:
            return {"patch_embedding.weight": torch.zeros(256, channels, 1, 2, 2)}

        return [
            ({**wan, **taking(16), **pose}, "SCAIL-Preview"),
            ({**wan, **taking(36)}, "image-to-video transformer of Wan 2.1 (I2V)"),
            ({**text, **taking(36)}, "image-to-video transformer of Wan 2.2 (A14B)"),
            ({**text, **taking(16)}, "text-to-video transformer of Wan"),
            ({**text, **taking(48)}, "Wan 2.2 TI2V-5B"),
            ({**wan, **taking(33)}, "Wan family with 33 input channels"),
            ({**wan, **taking(36), "motion_encoder.enc.fc.0.weight": torch.zeros(4, 4)}, "Wan-Animate"),
            ({**wan, **taking(36), "pose_patch_embedding.weight": torch.zeros(4, 4)}, "Wan-Animate"),
            ({**text, **taking(16), "vace_patch_embedding.bias": torch.zeros(4)}, "Wan VACE"),
        ]

    @pytest.mark.parametrize("names", ["Wan", "prefix", "diffusers"])
    def test_transformers_of_the_family(self, dit: Tensors, tmp_path: Path, names: str) -> None:
        for tensors, said in self.cases(dit):
            if names == "diffusers":
                tensors = diffusers_dit(tensors)
            elif names == "prefix":
                tensors = {PREFIX + name: tensor for name, tensor in tensors.items()}
            save_file(tensors, tmp_path / "dit.safetensors")
            for path in (tmp_path / "dit.safetensors", tmp_path):
                message = refused(path, components=("dit",))
                assert f"{tmp_path / 'dit.safetensors'} holds " in message
                assert said in message
                assert "`scail2-rt download DIR`" in message
                assert not AGAIN.search(message)

    def test_by_the_command(self, scail2: Run, dit: Tensors, tmp_path: Path) -> None:
        preview = next(tensors for tensors, said in self.cases(dit) if said == "SCAIL-Preview")
        file = tmp_path / "wan2.1_scail_preview.safetensors"
        save_file(preview, file)
        assert "SCAIL-Preview" in error_of(scail2("inspect", file))
        assert "SCAIL-Preview" in error_of(scail2("convert", file, "-o", tmp_path / "out.safetensors"))

    def test_the_official_folder_of_scail_preview(self, tiny_checkpoint: Path, dit: Tensors, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "SCAIL-Preview"))
        tensors = {name: tensor for name, tensor in dit.items() if not name.startswith("patch_embedding_mask")}
        torch.save({"module": sat_module(tensors)}, folder / SAT_FILE)
        assert "SCAIL-Preview" in refused(folder)

    @pytest.mark.parametrize(
        "name",
        [
            "encoder.downsamples.0.downsamples.0.residual.0.gamma",
            "decoder.upsamples.3.upsamples.1.residual.2.weight",
            "encoder.down_blocks.0.resnets.0.norm1.gamma",
        ],
    )
    def test_the_vae_of_wan_2_2(self, scail2: Run, tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
        save_file({name: torch.ones(160, 1, 1, 1)}, tmp_path / "wan2.2_vae.safetensors")
        message = refused(tiny_checkpoint, vae=tmp_path / "wan2.2_vae.safetensors")
        assert "holds the VAE of Wan 2.2 (48 channels)" in message
        assert "Wan2.1_VAE.pth" in message
        assert not AGAIN.search(message)
        if name.startswith("decoder"):
            assert "VAE of Wan 2.2" in error_of(scail2("inspect", tmp_path / "wan2.2_vae.safetensors"))

    def test_t5_is_not_umt5(self, tiny_checkpoint: Path, opened: Checkpoint, tmp_path: Path) -> None:
        stored = hugging_face_umt5(tensors_of(opened.sources["umt5"]))
        tensors = {n: t for n, t in stored.items() if "block.1.layer.0.SelfAttention.relative" not in n}
        save_file(tensors, tmp_path / "t5xxl_fp16.safetensors")
        message = refused(tiny_checkpoint, umt5=tmp_path / "t5xxl_fp16.safetensors", tokenizer=opened.tokenizer)
        assert "holds a T5 encoder, not umT5" in message

    def test_whole_files_that_do_not_fit(self, dit: Tensors, tmp_path: Path) -> None:
        save_file({**dit, "blocks.0.norm3.bias": torch.zeros(9)}, tmp_path / "dit.safetensors")
        assert not AGAIN.search(refused(tmp_path / "dit.safetensors", components=("dit",)))


class TestDiffusersNames:
    def test_the_vae_is_read(self, tiny_checkpoint: Path, opened: Checkpoint, tmp_path: Path) -> None:
        wan = tensors_of(opened.sources["vae"])
        stored = diffusers_vae(wan)
        assert len(stored) == len(wan) == 194
        assert "decoder.up_blocks.1.resnets.0.conv_shortcut.weight" in stored
        save_file(stored, tmp_path / "diffusion_pytorch_model.safetensors")
        found = open_checkpoint(tiny_checkpoint, vae=tmp_path / "diffusion_pytorch_model.safetensors")
        assert_same(found.sources["vae"], wan)
        assert found.config == opened.config

    def test_the_transformer_is_read(self, scail2: Run, dit: Tensors, tmp_path: Path) -> None:
        stored = diffusers_dit(dit)
        assert len(stored) == len(dit)
        assert "blocks.1.attn2.norm_added_k.weight" in stored
        save_file(stored, tmp_path / "dit.safetensors")
        assert_same(open_checkpoint(tmp_path / "dit.safetensors", components=("dit",)).sources["dit"], dit)
        assert "diffusers names" in scail2("inspect", tmp_path / "dit.safetensors").stdout

    def test_a_repository_of_diffusers(self, tiny_checkpoint: Path, opened: Checkpoint, tmp_path: Path) -> None:
        """`transformer`, `vae`, `text_encoder`, `image_encoder`, `tokenizer`; the folder, or the file in it."""
        folder = tmp_path / "repository"
        parts = {"transformer": diffusers_dit(tensors_of(opened.sources["dit"]))}
        parts["vae"] = diffusers_vae(tensors_of(opened.sources["vae"]))
        parts["text_encoder"] = hugging_face_umt5(tensors_of(opened.sources["umt5"]))
        for name, tensors in parts.items():
            (folder / name).mkdir(parents=True)
            save_file(tensors, folder / name / "model.safetensors")
        shutil.copy(tiny_checkpoint / CLIP_FILE, folder)
        (folder / "tokenizer").mkdir()
        shutil.copy(tiny_checkpoint / "umt5-xxl/tokenizer.json", folder / "tokenizer")
        for path in (folder, folder / "transformer/model.safetensors"):
            found = open_checkpoint(path, tokenizer=folder / "tokenizer")
            assert found.config == opened.config
