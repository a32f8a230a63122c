"""Compare ComfyUI's noise and noise levels with those of this package.

    PYTHON -m tests.parity.comfyui_numbers FOLDER     (ComfyUI's Python and folder; on the CPU)

Prints one line per comparison; exit code 1 if one differs from the result in `docs/comfyui.md`."""

import importlib
import sys
from types import SimpleNamespace

import torch

from scail2_rt.runtime.pipeline.schedulers import make_scheduler

CASES = ((6, 5.0, 6e-4), (8, 5.0, 6e-4), (40, 3.0, 1e-4))  # steps, shift, largest difference of the levels


def main(folder: str) -> int:
    sys.path.insert(0, folder)
    sys.argv = ["main.py", "--cpu"]
    importlib.import_module("comfy.options").enable_args_parsing()
    sampling, samplers, sample = (
        importlib.import_module(f"comfy.{name}") for name in ("model_sampling", "samplers", "sample")
    )
    failed = 0
    for steps, shift, allowed in CASES:
        levels = type("Levels", (sampling.ModelSamplingDiscreteFlow, sampling.CONST), {})(
            SimpleNamespace(sampling_settings={"shift": shift})
        )
        theirs = samplers.calculate_sigmas(levels, "simple", steps)[:steps]
        ours = torch.tensor(make_scheduler("euler", steps, shift).timesteps) / 1000
        apart = float((theirs - ours).abs().max())
        failed += apart > allowed
        print(f"euler, simple, {steps} steps, shift {shift:g}: levels differ by at most {apart:.6f}")
    shape = (16, 21, 112, 64)
    ours = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    equal = torch.equal(sample.prepare_noise(torch.zeros(1, *shape), 7)[0], ours)
    print(f"first noise of a seed: {'equal' if equal else 'not equal'}")
    return failed + (not equal)


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1]) else 0)
