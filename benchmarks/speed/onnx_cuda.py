"""Compare ONNX Runtime's CUDA provider with the torch backend: all stages of the tiny and the sprite checkpoint.

`python -m scail2_rt.benchmarks.speed.onnx_cuda prepare DIR` makes the engine folders, in fp32 and fp16 for both
backends. It needs the packages that trace graphs, but no GPU. `... run DIR` needs a GPU and onnxruntime-gpu; it runs
`verify` on each folder and reports the error of every stage against the plain fp32 stage and its time in both backends.
DIR may be copied from one machine to another. The last line is JSON. Exit code 1 if a stage fails.
"""

import argparse
import json
import sys
from pathlib import Path

from scail2_rt.benchmarks.sprites.shipped import CHECKPOINT
from scail2_rt.engines.build.build import BuildRequest, build
from scail2_rt.engines.observer import SilentObserver
from scail2_rt.engines.verify.verify import VerifyReport, VerifyRequest, open_for, verify
from scail2_rt.export.checkpoint.open import open_checkpoint
from scail2_rt.export.checkpoint.random_checkpoint import make_checkpoint
from scail2_rt.runtime.jobs.card_report import family_rows

BACKENDS = ("torch", "onnxruntime")
PRECISIONS = ("fp32", "fp16")
MODELS = ("tiny", "sprites")


def checkpoint_of(directory: Path, model: str) -> Path:
    return directory / "tiny-checkpoint" if model == "tiny" else CHECKPOINT


def prepare(directory: Path) -> None:
    """Make the engine folders `<model>-<precision>` in `directory`."""
    tiny = checkpoint_of(directory, "tiny")
    if not tiny.exists():
        make_checkpoint(tiny)
    for model in MODELS:
        checkpoint = checkpoint_of(directory, model)
        for precision in PRECISIONS:
            request = BuildRequest(checkpoint, directory / f"{model}-{precision}", BACKENDS, precision)
            report = build(request, open_checkpoint(checkpoint), SilentObserver())
            print(f"{report.directory}: {report.folder_bytes / 2**20:.1f} MiB", flush=True)


def run(directory: Path, repeats: int) -> list[VerifyReport]:
    reports = []
    for model in MODELS:
        for precision in PRECISIONS:
            folder = directory / f"{model}-{precision}"
            checkpoint = open_for(folder, checkpoint_of(directory, model))
            report = verify(VerifyRequest(folder, BACKENDS, repeats), checkpoint)
            print(f"\n{folder.name}: {'PASS' if report.passed else 'FAIL'} in {report.wall_s:.1f} s")
            failed = [f"FAIL {result.stage}: {result}" for result in report.stages if not result.passed]
            print("\n".join([*family_rows(report), *failed]), flush=True)
            reports.append(report)
    return reports


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("prepare", "run"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    if given.action == "prepare":
        prepare(given.directory)
        return 0
    import onnxruntime
    import torch

    reports = run(given.directory, given.repeats)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found = [
        {"folder": Path(report.directory).name, "stage": r.stage, "backend": r.backend, "error": r.error}
        | {"ms": r.median_s * 1e3, "passed": r.passed, "fault": r.fault}
        for report in reports
        for r in report.stages
    ]
    versions = {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__}
    print(json.dumps({"device": device, "versions": versions, "stages": found}))
    return 0 if all(report.passed for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
