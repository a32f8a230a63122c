"""Queue a workflow in a running ComfyUI, with a seed of your choice, and wait for its video.

Needs ComfyUI with the nodes and the files of their example workflows:

    scail2-rt comfyui install PATH/TO/ComfyUI --sprites
    python examples/comfyui_client.py http://127.0.0.1:8188 examples/comfyui/animate_api.json 7

A workflow of yours is written in this form by ComfyUI's menu, Workflow > Export (API)."""

import json
import sys
import time
from pathlib import Path
from urllib.request import urlopen

url, workflow, seed = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), int(sys.argv[3])
for node in workflow.values():
    if node["class_type"] == "Scail2Animate":
        node["inputs"]["seed"] = seed
with urlopen(f"{url}/prompt", json.dumps({"prompt": workflow}).encode()) as answer:
    prompt_id = json.load(answer)["prompt_id"]
while not (history := json.load(urlopen(f"{url}/history/{prompt_id}"))):
    time.sleep(0.5)
run = history[prompt_id]
if run["status"]["status_str"] != "success":
    sys.exit(f"error: {run['status']['messages'][-1]}")
files = [file for output in run["outputs"].values() for file in output.get("images", ()) if file["type"] == "output"]
print(*(Path("output", file["subfolder"], file["filename"]) for file in files), sep="\n")  # in ComfyUI's folder
