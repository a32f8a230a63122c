"""Ask a running service for a video with the `openai` package.

Needs `pip install openai`, a case folder, and a service, here on what `make demo` makes:

    scail2-rt serve out/engines
    python examples/service_client.py http://127.0.0.1:8000 out/case out/served.mp4

The client sends one file with the request and the others beforehand. A service that is open to other machines needs a
key, which this script reads from SCAIL2_RT_API_KEY."""

import os
import sys
from pathlib import Path

from openai import OpenAI

url, case, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("SCAIL2_RT_API_KEY", "none"))
names = {"mask_reference": "ref_mask.png", "video_reference": "rendered_v2.mp4"}
names["video_mask_reference"] = "rendered_mask_v2.mp4"
sent = {field: client.files.create(file=case / name, purpose="user_data").id for field, name in names.items()}
inputs = {field: {"file_id": file_id} for field, file_id in sent.items()}
small = {"steps": 2, "guidance": 1}  # for the small model of the demo
request = {"prompt": "a man stretches", "size": "128x128", "input_reference": case / "ref.png"}
video = client.videos.create_and_poll(**request, extra_body={**inputs, **small, "seed": 7})
if video.error:
    sys.exit(f"error: {video.error.message}")
client.videos.download_content(video.id).write_to_file(output)
