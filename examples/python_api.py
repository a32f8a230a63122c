"""Animate one character: open engines once, check a request, generate its video.

Needs an engine folder and a case folder. `make demo` makes both:

    python examples/python_api.py out/engines out/case out/api.mp4

The size, steps and guidance are for the small model of the demo. Leave them out with SCAIL-2 itself."""

import sys
from pathlib import Path

from scail2_rt.runtime import Output, Request, Session

engines, case, output = map(Path, sys.argv[1:])
request = Request(
    image=case / "ref.png",
    mask_image=case / "ref_mask.png",
    driving=case / "rendered_v2.mp4",
    mask_video=case / "rendered_mask_v2.mp4",
    prompt="a man stretches",
    size=(128, 128),
    steps=2,
    guidance=1,
)
with Session.open(engines) as session:
    plan = session.check(request)  # loads no weights; InputError says what is wrong with the request
    print(f"{plan.frames} frames of {plan.height}x{plan.width}", *plan.warnings, sep="\n")
    result = session.generate(plan, Output(output, overwrite=True), on_progress=print)
print(result.path, result.report_path)
