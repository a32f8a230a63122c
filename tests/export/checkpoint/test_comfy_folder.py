"""ComfyUI's models folder: given it, its parent or a file in it, every component is found where ComfyUI stores it; the
options named by an error make a working command."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from scail2_rt.export.checkpoint.comfy_folder import model_folders
from scail2_rt.export.checkpoint.open import Checkpoint, open_checkpoint
from scail2_rt.export.checkpoint.random_checkpoint import TOKENIZER_FILE
from scail2_rt.kernels.errors import InputError
from tests.support.command import Run, error_of, one_json
from tests.support.quantised_files import lightx2v_int8, write_gguf
from tests.support.repackaged import hugging_face_clip, hugging_face_umt5, tensors_of

pytest_plugins = ["tests.support.runtime_fixtures"]

DIT = "diffusion_models/SCAIL/wan2.1_14B_SCAIL_2_int8.safetensors"
VAE = "vae/wan_2.1_vae.safetensors"
UMT5 = "text_encoders/umt5_xxl_fp16.safetensors"
CLIP = "clip_vision/clip_vision_h.safetensors"


@pytest.fixture
def models(opened: Checkpoint, tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """`ComfyUI/models` with the tiny checkpoint's components and files of other models; a tokenizer beside umT5."""
    models = tmp_path / "ComfyUI/models"
    for name in ("diffusion_models/SCAIL", "unet", "vae", "text_encoders", "clip_vision", "loras", "upscale_models"):
        (models / name).mkdir(parents=True)
    lightx2v_int8(tensors_of(opened.sources["dit"])).save(models / DIT)
    save_file(tensors_of(opened.sources["vae"]), models / VAE)
    save_file(hugging_face_umt5(tensors_of(opened.sources["umt5"])), models / UMT5)
    save_file(hugging_face_clip(tensors_of(opened.sources["clip"])), models / CLIP)
    shutil.copy(tiny_checkpoint / TOKENIZER_FILE, models / "text_encoders")
    wan22 = {"encoder.downsamples.0.downsamples.0.residual.0.gamma": torch.ones(160, 1, 1, 1)}
    save_file(wan22, models / "vae/wan2.2_vae.safetensors")
    save_file({"decoder.up_blocks.0.resnets.0.norm1.weight": torch.ones(4)}, models / "vae/sdxl_vae.safetensors")
    i2v = {"patch_embedding.weight": torch.zeros(8, 36, 1, 2, 2), "img_emb.proj.0.weight": torch.zeros(8)}
    save_file({**i2v, "blocks.0.self_attn.q.weight": torch.zeros(8, 8)}, models / "unet/wan2.1_i2v.safetensors")
    save_file(tensors_of(opened.sources["vae"]), models / "loras/not_looked_at.safetensors")
    (models / "upscale_models/old.pth").write_bytes(b"\x80\x02broken")
    return models


def files(checkpoint: Checkpoint, models: Path) -> set[str]:
    return {str(file.resolve().relative_to(models.resolve())) for file in checkpoint.files}


ALL = {DIT, VAE, UMT5, CLIP, "text_encoders/tokenizer.json"}


@pytest.mark.parametrize("given", [".", "..", DIT, "diffusion_models", "diffusion_models/SCAIL"])
def test_any_place_in_it_finds_all_parts(models: Path, opened: Checkpoint, given: str) -> None:
    found = open_checkpoint(models / given)
    assert files(found, models) == ALL
    assert found.config == opened.config


def test_by_the_command_from_a_relative_path(scail2: Run, models: Path) -> None:
    built = scail2("build-engines", DIT, "-o", "engines", "--backend", "torch", "--precision", "bf16", cwd=models)
    assert built.returncode == 0, built.stderr
    shown = one_json(scail2("inspect", models, "--json"))
    assert (shown["missing"], shown["problems"]) == ([], [])
    assert [part["problem"] for part in shown["parts"]] == [None] * 4


def test_what_to_name_is_said_and_works(scail2: Run, models: Path, opened: Checkpoint) -> None:
    second = models / "unet/scail2-Q8_0.gguf"
    write_gguf(second, tensors_of(opened.sources["dit"]), "Q8_0")
    convert = ("--all", "-o", models.parent / "out/dit.safetensors")
    message = error_of(scail2("convert", models, *convert))
    assert f"several files with a transformer ({DIT}, unet/scail2-Q8_0.gguf). Name the one to use" in message
    named = message.rpartition("as CHECKPOINT: ")[2]
    shutil.copy(models / VAE, models / "vae/copy.safetensors")
    message = error_of(scail2("convert", named, *convert))
    assert "several files with a VAE (vae/copy.safetensors, vae/wan_2.1_vae.safetensors)" in message
    option = message.rpartition("for example with ")[2].split(" ", 1)
    assert option[0] == "--vae"
    assert scail2("convert", named, *convert, *option).returncode == 0
    assert open_checkpoint(second, vae=models / VAE).sources["dit"].files == (second,)


def test_two_transformers_in_a_folder_beside_the_other_parts(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The file named by the error is in a deeper folder than the VAE."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "folder"))
    shutil.rmtree(folder / "model")
    (folder / "transformers").mkdir()
    tensors = tensors_of(open_checkpoint(tiny_checkpoint).sources["dit"])
    for name in ("a", "b"):
        save_file(tensors, folder / f"transformers/{name}.safetensors")
    with pytest.raises(InputError, match="Name the one to use") as caught:
        open_checkpoint(folder)
    named = Path(str(caught.value).rpartition("as CHECKPOINT: ")[2])
    assert open_checkpoint(named).sources["dit"].files == (folder / "transformers/a.safetensors",)


def test_a_neighbouring_checkpoint_is_not_taken(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "other_model")
    (tmp_path / "mine").mkdir()
    save_file(tensors_of(open_checkpoint(tiny_checkpoint).sources["dit"]), tmp_path / "mine/dit.safetensors")
    with pytest.raises(InputError, match="not complete"):
        open_checkpoint(tmp_path / "mine/dit.safetensors")


class TestExtraPaths:
    def elsewhere(self, models: Path) -> Path:
        """The VAE, umT5 and its tokenizer moved to another disk."""
        other = models.parent.parent / "disk"
        for kind in ("vae", "text_encoders"):
            (other / kind).parent.mkdir(exist_ok=True)
            shutil.move(models / kind, other / kind)
        return other

    @pytest.mark.parametrize("place", [".", ".."])
    @pytest.mark.parametrize("base", ["absolute", "relative", "none"])
    def test_are_searched_too(self, models: Path, opened: Checkpoint, place: str, base: str) -> None:
        other = self.elsewhere(models)
        relative = Path("../" if place == ".." else "../../") / "disk"
        lines = {"absolute": f"    base_path: {other}\n", "relative": f"    base_path: {relative}\n", "none": ""}[base]
        inner = "" if base != "none" else f"{relative}/"
        text = f"# a comment\nmine:\n{lines}    is_default: true\n    vae: {inner}vae/\n    clip: |\n"
        text += f"      {inner}nowhere\n      {inner}text_encoders\nother:\n"
        (models / place / "extra_model_paths.yaml").write_text(text)
        found = open_checkpoint(models / DIT)
        assert found.config == opened.config
        assert found.sources["vae"].files == ((other / VAE).resolve(),)
        assert found.tokenizer == (other / "text_encoders/tokenizer.json").resolve()

    def test_a_damaged_file_is_named(self, models: Path) -> None:
        for text in ("a: [", "just words", "a: 3"):
            (models / "extra_model_paths.yaml").write_text(text)
            with pytest.raises(InputError, match=r"extra_model_paths\.yaml cannot be read"):
                open_checkpoint(models)

    def test_a_folder_named_twice_is_one(self, models: Path) -> None:
        (models.parent / "extra_model_paths.yaml").write_text("a:\n  base_path: models\n  vae: vae\n  unet: unet\n")
        folders = model_folders(models)
        assert folders is not None
        assert folders.places["vae"] == (models / "vae",)
        assert files(open_checkpoint(models), models) == ALL


def test_links_are_followed_once(models: Path) -> None:
    (models / "vae/loop").symlink_to(models / "vae")
    moved = models.parent / "big.safetensors"
    shutil.move(models / VAE, moved)
    (models / VAE).symlink_to(moved)
    assert open_checkpoint(models).sources["vae"].files[0].resolve() == moved.resolve()


@pytest.mark.parametrize(
    ("gone", "said"), [(VAE, "the VAE in {models}/vae"), (UMT5, "the umT5 encoder in {models}/text_encoders")]
)
def test_what_is_missing_is_named_with_its_folder(models: Path, gone: str, said: str) -> None:
    (models / gone).unlink()
    with pytest.raises(InputError) as caught:
        open_checkpoint(models)
    assert said.format(models=models) in str(caught.value)
    if gone == VAE:
        assert "wan2.2_vae.safetensors holds the VAE of Wan 2.2" in str(caught.value)
        assert "--vae FILE" in str(caught.value)


def test_other_folders_are_none(tiny_checkpoint: Path, tmp_path: Path) -> None:
    make: Callable[[str], None] = lambda name: (tmp_path / name).mkdir(parents=True)  # noqa: E731
    make("repo/vae")
    make("repo/transformer")
    for path in (tiny_checkpoint, tmp_path / "repo", tmp_path / "repo/vae", tmp_path):
        assert model_folders(path) is None
