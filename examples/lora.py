"""Fuse a LoRA at two strengths and make the same video with each.

Needs a checkpoint, a LoRA file or PEFT folder for it, and a case folder:

    python examples/lora.py SCAIL-2/ style.safetensors my_case/ out/lora

`scail2-rt inspect style.safetensors` says beforehand what the file is. A strength is part of the weights, so each one
gets an engine folder; a folder that exists is taken as it is."""

import sys
from pathlib import Path

from scail2_rt.engines.build.build import BuildRequest, build
from scail2_rt.export.checkpoint.lora import LoRASpec
from scail2_rt.export.checkpoint.open import open_checkpoint
from scail2_rt.runtime import Output, Request, Session
from scail2_rt.runtime.core.case_folder import read_case

checkpoint, lora, case, output = map(Path, sys.argv[1:])
found = read_case(case)
files = (found.image, found.mask_image, found.driving, found.mask_video)
request = Request(*files, mode=found.mode, size=(128, 128), steps=2, guidance=1)  # for the small model of the demo
for strength in (0.5, 1.0):
    engines = output / f"engines-{strength}"
    loras = (LoRASpec(lora, strength),)
    report = build(BuildRequest(checkpoint, engines, ("torch",), loras=loras), open_checkpoint(checkpoint))
    print(*(fused.text for fused in report.loras), sep="\n")
    with Session.open(engines) as session:
        print(session.generate(session.check(request), Output(output / f"{strength}.mp4", overwrite=True)).path)
