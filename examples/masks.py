"""Make the masks of a reference image and a driving clip, then animate with them.

Needs an engine folder, a reference image, a driving clip and a segmenter (`pip install '.[masks]'`, then
`scail2-rt download --segmenter sam2`, once):

    python examples/masks.py engines photo.jpg clip.mp4 out.mp4

A folder with another segmenter may follow, and boxes (x0,y0,x1,y1:colour) that show the characters. The small
segmenter for the drawn figures of `make demo` needs both:

    python examples/masks.py out/engines out/case/ref.png out/case/rendered_v2.mp4 out/masked.mp4 \\
        benchmarks/sprites/segmenter image:30,32,102,122:red 31,16,100,118:red"""

import sys
from pathlib import Path

from scail2_rt.runtime import MaskOptions, Output, Request, Session, make_masks

engines, image, driving, output = map(Path, sys.argv[1:5])
weights, *boxes = sys.argv[5:] or [None]
options = MaskOptions(mode="animate", weights=weights, boxes=boxes)
masks = make_masks(image, driving, output.with_suffix(".masks"), options, on_progress=print)
print(masks.text, *masks.notes, sep="\n")  # names the sheet that shows the masks; look at it before a long run
small = {"size": (128, 128), "steps": 2, "guidance": 1}  # for the small model of the demo
request = Request(image, masks.mask_image, driving, masks.mask_video, mode=masks.mode, **small)
with Session.open(engines) as session:
    print(session.generate(session.check(request), Output(output, overwrite=True)).path)
