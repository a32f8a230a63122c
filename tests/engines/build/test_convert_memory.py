"""Converting a checkpoint must need much less memory than its size: measured in a separate process.

Besides being measured, the process has a hard limit on private writable memory (RLIMIT_DATA, which Linux also applies
to private file mappings), which catches allocations between two samples. The files are sparse: one of 0.9 GB (and in
`make soak` the `wide` preset), converted completely with a LoRA and by `scail2-rt convert`, and one of the official
65.6 GB with all 987 SAT tensors, of which one block is converted. A block is converted from every quantised format, and
an embedding half as large as umT5's is read from a GGUF file.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from scail2_rt.export.checkpoint.derive import dit_shapes
from scail2_rt.export.checkpoint.random_checkpoint import PRESETS, SAT_FILE, Preset, make_checkpoint, random_tensor
from scail2_rt.export.models.config import DiTConfig
from tests.support.quantised_files import hollow_file, hollow_gguf

GIB = 2**30
MIB = 2**20
WIDE = DiTConfig(dim=4096, heads=32, layers=1, ffn_dim=11264, text_dim=64, clip_dim=160)


@dataclass(frozen=True, slots=True)
class Large:
    """A checkpoint of three blocks; at least so many bytes; under these limits in bytes, with a LoRA and without."""

    preset: Preset
    size: float
    limit: int
    command_limit: int

    @property
    def width(self) -> int:
        return self.preset.dit.dim


_DIT = DiTConfig(dim=2048, heads=16, layers=3, ffn_dim=5632, text_dim=64, clip_dim=160)
LARGE = [
    pytest.param(Large(replace(PRESETS["wide"], dit=_DIT), 0.8e9, 320 * MIB, 200 * MIB), id="0.9 GB"),
    pytest.param(Large(PRESETS["wide"], 3.5e9, GIB, GIB // 2), id="3.6 GB", marks=pytest.mark.soak),
]
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures memory through Linux's /proc")

# Writes {"module": SAT tensors} of the 14B model without their data: a sparse file with headers only.
SPARSE_CHECKPOINT = """
import sys, torch
from pathlib import Path
from scail2_rt.export.models.config import DiTConfig
from scail2_rt.export.checkpoint.derive import dit_shapes
from scail2_rt.export.checkpoint.sat_names import SAT_PREFIX, wan_to_sat
shapes = dit_shapes(DiTConfig(dim=5120, heads=40, layers=40, ffn_dim=13824))
tensors = {}
for name, parts in wan_to_sat(set(shapes)).items():
    rows, *rest = shapes[parts[0]]
    tensors[SAT_PREFIX + name] = torch.empty(len(parts) * rows, *rest)
folder = Path(sys.argv[1])
(folder / "model/1").mkdir(parents=True)
(folder / "model/latest").write_text("1")
with torch.serialization.skip_data():
    torch.save({"module": tensors}, folder / "model/1/fsdp2_rank_0000_checkpoint.pt")
"""

LORA = """
import sys, torch
from safetensors.torch import save_file
from scail2_rt.export.checkpoint.open import open_checkpoint
source = open_checkpoint(sys.argv[1], components=("dit",)).sources["dit"]
linears = [n.removesuffix(".weight") for n in source.keys() if n.startswith("blocks.") and len(source.shape(n)) == 2]
tensors = {}
for linear in linears:
    rows, columns = source.shape(linear + ".weight")
    tensors[f"diffusion_model.{linear}.lora_up.weight"] = torch.full((rows, 16), 0.25, dtype=torch.bfloat16)
    tensors[f"diffusion_model.{linear}.lora_down.weight"] = torch.full((16, columns), 0.5, dtype=torch.bfloat16)
save_file(tensors, sys.argv[2])
"""

# From here on, the peak of this process's anonymous memory is measured, and `limit` (the last argument) applies.
WATCH = """
import json, os, re, resource, sys, threading, time, torch
from pathlib import Path
limit = int(sys.argv[-1])
torch.set_num_threads(1)

def status(key):
    return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024

peak, done = [0], threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], status("RssAnon"))
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
time.sleep(0.05)
start = status("RssAnon")
resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + limit,) * 2)
"""

# Opens, fuses, casts and discards every wanted tensor; prints a summary and the peak of anonymous memory.
CONVERT = f"""
from scail2_rt.export.checkpoint.open import open_checkpoint
from scail2_rt.export.checkpoint.lora import LoRASpec, apply_loras
{WATCH}
checkpoint, lora, wanted = sys.argv[1], sys.argv[2], re.compile(sys.argv[3])
components = ("dit",)
source = open_checkpoint(checkpoint, components=components).sources["dit"]
if lora:
    source = apply_loras(source, [LoRASpec(Path(lora), 1.0)])
read = written = 0
firsts, samples = {{}}, {{}}
with open(os.devnull, "wb") as out:
    for name in source.keys():
        if wanted.match(name):
            tensor = source.get(name).to(torch.bfloat16).contiguous()
            read += tensor.numel() * 4
            written += out.write(tensor.view(torch.uint8).numpy().data)
            firsts[name], samples[name] = tensor.flatten()[0].item(), tensor.flatten()[-1].item()
done.set()
print(json.dumps({{"start": start, "peak": peak[0], "read": read, "written": written, "firsts": firsts,
                  "samples": samples}}))
"""

# Every value of the tensor `token_embd.weight` of a GGUF file, in the pieces that a build converts.
EMBEDDING = f"""
from scail2_rt.engines.folder.weights import pieces
from scail2_rt.export.checkpoint.gguf_file import open_gguf
import gguf
{WATCH}
source = open_gguf(Path(sys.argv[1]))
count = sum(values.numel() for _, values in pieces(source, ("token_embd.weight",)))
done.set()
print(json.dumps({{"count": count, "grown": peak[0] - start}}))
"""

# `scail2-rt convert` in this process, with the limit; prints the increase of its peak of anonymous memory.
COMMAND = f"""
from scail2_rt.engines.build import convert
from scail2_rt.runtime.cli.main import main
{WATCH}
checkpoint, output = sys.argv[1], sys.argv[2]
try:
    main(["convert", checkpoint, "-o", output, "--dtype", "bf16", "--json"])
except SystemExit as end:
    done.set()
    print(json.dumps({{"code": end.code, "grown": peak[0] - start}}))
"""


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    # freed memory goes back at once, whatever the tests around are run with
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for a large sparse file; removed afterwards (pytest would keep it)."""
    hole = tmp_path / "hole"
    with hole.open("wb") as file:
        file.truncate(64 * 2**20)
    if hole.stat().st_blocks * 512 > 2**20:
        pytest.skip(f"the file system of {tmp_path} does not keep holes in files")
    yield tmp_path / "big"
    shutil.rmtree(tmp_path / "big", ignore_errors=True)


@LINUX
@pytest.mark.parametrize("large", LARGE)
def test_conversion_holds_one_tensor_at_a_time(folder: Path, tmp_path: Path, large: Large) -> None:
    make_checkpoint(folder, large.preset)
    size = (folder / SAT_FILE).stat().st_size
    assert size > large.size
    run(LORA, folder, tmp_path / "lora.safetensors")
    result = json.loads(run(CONVERT, folder, tmp_path / "lora.safetensors", "", large.limit))
    assert result["read"] == pytest.approx(size, rel=0.01)
    assert result["written"] * 2 == result["read"]
    assert result["samples"]["blocks.2.ffn.2.weight"] == 16 * 0.25 * 0.5  # the LoRA alone: the stored row is zero
    first_row = random_tensor("dit", "blocks.2.self_attn.v.weight", (1, large.width), 0)
    assert result["firsts"]["blocks.2.self_attn.v.weight"] == pytest.approx(first_row[0, 0].item() + 2, abs=0.02)
    grown = result["peak"] - result["start"]
    print(f"{size / 1e9:.1f} GB converted with {grown / 1e6:.0f} MB of anonymous memory")
    assert grown < large.limit


@LINUX
@pytest.mark.parametrize("large", LARGE)
def test_the_convert_command_needs_no_more(folder: Path, large: Large) -> None:
    make_checkpoint(folder, large.preset)
    output = folder / "out/wide.safetensors"
    report, result = map(json.loads, run(COMMAND, folder, output, large.limit).splitlines())
    assert result["code"] == 0
    (file,) = report["files"]
    assert file["size"] == output.stat().st_size > large.size / 2
    with safe_open(output, "pt") as opened:
        rows = opened.get_slice("blocks.2.self_attn.v.weight")
        first_row = random_tensor("dit", "blocks.2.self_attn.v.weight", (1, large.width), 0)
        assert torch.equal(rows[:1], first_row.bfloat16())
        assert not rows[1:].any()
    print(f"{file['size'] / 1e9:.1f} GB written with {result['grown'] / 1e6:.0f} MB of anonymous memory")
    assert result["grown"] < large.command_limit


@LINUX
def test_official_size_opens_and_converts_a_block(folder: Path) -> None:
    run(SPARSE_CHECKPOINT, folder)
    assert (folder / SAT_FILE).stat().st_size > 65.5e9
    result = json.loads(run(CONVERT, folder, "", r"blocks\.39\.(self_attn|ffn\.2)", GIB))
    assert len(result["samples"]) == 12
    assert result["samples"]["blocks.39.self_attn.v.weight"] == 0
    grown = result["peak"] - result["start"]
    print(f"65.6 GB opened, {result['read'] / 1e9:.1f} GB converted with {grown / 1e6:.0f} MB of anonymous memory")
    assert grown < GIB


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize(
    "form", ["int8_tensorwise", "convrot", "mxfp8", "nvfp4", "quanto", "fp8_blocks", "lightx2v", "Q4_K", "Q8_0"]
)
def test_the_convert_command_needs_no_more_for_quantised_files(folder, form):
    folder.mkdir()
    gguf = form.startswith("Q")
    file = folder / f"wide.{'gguf' if gguf else 'safetensors'}"
    (hollow_gguf if gguf else hollow_file)(file, dit_shapes(WIDE), form)
    output = folder / "out/wide.safetensors"
    report, result = map(json.loads, run(COMMAND, file, output, GIB).splitlines())
    assert result["code"] == 0
    with safe_open(output, "pt") as opened:
        assert not opened.get_slice("blocks.0.ffn.0.weight")[:64].any()
    print(f"{form}: {report['files'][0]['size'] / 1e6:.0f} MB written with {result['grown'] / 1e6:.0f} MB on top")
    assert result["grown"] < GIB


@LINUX
@pytest.mark.slow
def test_a_large_embedding_is_dequantised_by_rows(folder):
    folder.mkdir()
    hollow_gguf(folder / "umt5.gguf", {"token_embd.weight": (131072, 4096)}, "Q8_0", r"token_embd\.weight")
    result = json.loads(run(EMBEDDING, folder / "umt5.gguf", GIB))
    assert result["count"] == 131072 * 4096
    print(f"2.1 GB of fp32 dequantised with {result['grown'] / 1e6:.0f} MB on top")
    assert result["grown"] < GIB / 2
