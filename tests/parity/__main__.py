"""`python -m tests.parity FOLDER [--backend torch|onnxruntime] [--device cpu|cuda] [--gpus N]`: one line per
comparison, exit code 1 if any fails or a fixture file cannot be run. N processes share the pipeline fixtures."""

import argparse
import hashlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.parity import arithmetic, networks, pipeline
from tests.parity.fixtures import Golden, Row, exact, unknown

# Files without comparisons of their own, used by those of other files.
PARTS = ("_weights.safetensors", "_taps.safetensors", "_expected.safetensors")
TABLES = ("hankel", "clip_fea")  # shared inputs of the transformer's fixtures
SAFETENSORS = {
    "clip": networks.check_clip,
    "dit": networks.check_dit,
    "lora": arithmetic.check_lora,
    "pipeline": pipeline.check_pipeline,
    "preprocess": arithmetic.check_preprocess,
    "rope": arithmetic.check_rope,
    "solvers": arithmetic.check_solver,
    "t5": networks.check_umt5,
    "vae": networks.check_vae,
}


def rows_of(golden: Golden, path: Path) -> Iterator[Row]:
    """The comparisons of one file; none for a file that only other files use."""
    folder = path.relative_to(golden.root).parts[0]
    if path.suffix == ".safetensors":
        if folder not in SAFETENSORS:
            yield unknown(str(path.relative_to(golden.root)))
        elif not _is_part(golden, path, folder):
            yield from SAFETENSORS[folder](golden, golden.load(path.relative_to(golden.root)))
    elif path.suffix == ".json":
        yield from _json_rows(golden, path, folder)
    elif path.name == "latest" and folder == "checkpoint":
        yield from arithmetic.check_checkpoint_folder(golden, path.parent.parent)


def _is_part(golden: Golden, path: Path, folder: str) -> bool:
    if folder == "vae":
        return "encoder.conv1.weight" in golden.names(path)
    if folder == "dit" and len(golden.names(path)) == 1 and golden.names(path)[0] in TABLES:
        return True
    return path.name.endswith(PARTS)


def _json_rows(golden: Golden, path: Path, folder: str) -> Iterator[Row]:
    content = golden.json(path)
    if folder == "checkpoint":
        counts = all(isinstance(value, int) for value in content.values())
        yield from (arithmetic.check_counts if counts else arithmetic.check_keys)(golden, path)
    elif folder == "preprocess":
        yield from arithmetic.check_threshold(golden, path)
    elif folder == "segments":
        yield from arithmetic.check_segments(golden, path)
    elif folder == "t5":
        yield from arithmetic.check_text(golden, path)
    elif path.parent == golden.root and path.name == "manifest.json":
        for name, entry in content.items():
            digest = hashlib.sha256((golden.root / name).read_bytes()).hexdigest()
            if digest != entry["sha256"]:
                yield exact(f"manifest.json {name} has its recorded SHA-256", False)
    elif path.parent != golden.root:
        yield unknown(str(path.relative_to(golden.root)))


def run(golden: Golden, only: str = "") -> Iterator[Row]:
    """Every file of the folder, or of the subject `only`, in order of name."""
    for path in sorted(p for p in (golden.root / only).rglob("*") if p.is_file()):
        found = False
        try:
            for row in rows_of(golden, path):
                found = True
                yield row
        except Exception:
            traceback.print_exc()
            yield unknown(str(path.relative_to(golden.root)))
            found = True
        if not found and path.suffix == ".safetensors" and not _belongs(golden, path):
            yield unknown(str(path.relative_to(golden.root)))


def _belongs(golden: Golden, path: Path) -> bool:
    """Whether a file is expected to have no comparisons."""
    return _is_part(golden, path, path.relative_to(golden.root).parts[0])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backend", choices=("torch", "onnxruntime"), default="torch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--only", default="", metavar="FOLDER", help="one subject, as in pipeline")
    arguments = parser.parse_args()
    if not arguments.folder.is_dir():
        parser.error(f"{arguments.folder} is not a folder of fixtures")
    torch.set_grad_enabled(False)
    failed = total = 0
    with Golden(arguments.folder, arguments.backend, arguments.device, arguments.gpus) as golden:
        for row in run(golden, arguments.only):
            print(row, flush=True)
            total, failed = total + 1, failed + (not row.passed)
    print(f"{total - failed} passed, {failed} failed")
    return 1 if failed or not total else 0


if __name__ == "__main__":
    sys.exit(main())
