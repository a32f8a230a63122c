"""Animate many cases, each with two seeds, through engines that are opened once.

Needs an engine folder and case folders. With what `make demo` makes:

    python examples/batch.py out/engines out/batch out/case [CASE ...]

A case that cannot be used is reported and the others run. A second call continues where the first one stopped."""

import sys
from itertools import product
from pathlib import Path

from scail2_rt.runtime import Output, Request, Scail2Error, Session
from scail2_rt.runtime.core.case_folder import read_case

engines, output, *cases = map(Path, sys.argv[1:])
small = {"size": (128, 128), "steps": 2, "guidance": 1}  # for the small model of the demo
failed = 0
with Session.open(engines) as session:
    for case, seed in product(cases, (0, 1)):
        try:
            found = read_case(case)  # finds the files by their names
            files = (found.image, found.mask_image, found.driving, found.mask_video)
            plan = session.check(Request(*files, mode=found.mode, prompt="a man stretches", seed=seed, **small))
            print(session.generate(plan, Output(output / f"{case.name}-{seed}.mp4", resume=True)).path)
        except Scail2Error as error:
            failed += 1
            print(f"error: {case}, seed {seed}: {error}", file=sys.stderr)
sys.exit(failed > 0)
