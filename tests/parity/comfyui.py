"""The nodes in the real ComfyUI: its server on the CPU, the example workflows through its HTTP interface.

    PYTHON -m tests.parity.comfyui FOLDER [--page]

PYTHON is that of ComfyUI, with scail2-rt installed in it; FOLDER is ComfyUI's, with the nodes and the sprite engines
(`scail2-rt comfyui install FOLDER --sprites`). `--page` also loads and queues a workflow in a headless Chromium (needs
playwright). Prints one line per check; exit code 1 if one fails. Written for ComfyUI 0.3.64."""

import argparse
import asyncio
import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import av
import numpy as np
from safetensors.torch import save_file

from scail2_rt.benchmarks.sprites.quality.metrics import psnr
from scail2_rt.benchmarks.sprites.segmenting import shipped_segmenter
from scail2_rt.benchmarks.sprites.shipped import CHECKPOINT as SPRITES
from scail2_rt.benchmarks.sprites.world.cases import make_scene, render_case
from scail2_rt.export.checkpoint.open import open_checkpoint
from scail2_rt.runtime.media.video_reader import VideoReader
from tests.support.comfyui_prompt import prompt_of
from tests.support.repackaged import hugging_face_clip, hugging_face_umt5, tensors_of

PORT = 8199
CONFIG = "diffusion_models/config.json"
ADDRESS = f"127.0.0.1:{PORT}"
WORKFLOWS = ("animate", "replace")
START_S = 180


@dataclass(slots=True)
class Run:
    """The result of one prompt."""

    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    previews: int = 0
    texts: list[str] = field(default_factory=list)
    history: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def data(self, kind: str) -> list[dict[str, Any]]:
        return [data for name, data in self.events if name == kind]

    @property
    def shares(self) -> list[float]:
        """Progress of the Animate node."""
        nodes = [node for data in self.data("progress_state") for node in data["nodes"].values()]
        return [node["value"] / node["max"] for node in nodes if node["node_id"] == self.animate]

    animate: str = ""


class Server:
    """A running ComfyUI."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.log = folder, log
        self.client = uuid.uuid4().hex

    async def get(self, path: str) -> Any:
        async with aiohttp.ClientSession() as http, http.get(f"http://{ADDRESS}{path}") as answer:
            return await answer.json()

    async def post(self, path: str, body: Any = None) -> tuple[int, Any]:
        async with aiohttp.ClientSession() as http, http.post(f"http://{ADDRESS}{path}", json=body or {}) as answer:
            text = await answer.text()
            return answer.status, json.loads(text) if text.startswith("{") else text

    async def run(self, prompt: dict[str, Any], at: Callable[[float], Any] | None = None) -> Run:
        """Queue a prompt and follow it to its end. at(share): called, and awaited, with the Animate node's progress."""
        run = Run(animate=next((key for key, node in prompt.items() if node["class_type"] == "Scail2Animate"), ""))
        started = time.perf_counter()
        url = f"ws://{ADDRESS}/ws?clientId={self.client}"
        async with aiohttp.ClientSession() as http, http.ws_connect(url, max_msg_size=1 << 26) as socket:
            await socket.send_str(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
            status, answer = await self.post("/prompt", {"prompt": prompt, "client_id": self.client})
            if status != 200:
                run.events.append(("refused", answer))
                return run
            number = answer["prompt_id"]
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    kind = int.from_bytes(message.data[:4], "big")
                    run.previews += kind == 4
                    if kind == 3:
                        skip = 8 + int.from_bytes(message.data[4:8], "big")
                        run.texts.append(message.data[skip:].decode())
                    continue
                event = json.loads(message.data)
                run.events.append((event["type"], event["data"]))
                if at is not None and event["type"] == "progress_state" and run.shares:
                    await at(run.shares[-1])
                if event["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                    break
        run.seconds = time.perf_counter() - started
        for _ in range(50):  # the history is written after the last event
            run.history = (await self.get(f"/history/{number}")).get(number, {})
            if run.history:
                break
            await asyncio.sleep(0.1)
        return run


@contextlib.asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[Server]:
    with tempfile.TemporaryDirectory() as temporary:
        log = Path(temporary) / "server.log"
        words = [sys.executable, "main.py", "--cpu", "--port", str(PORT), "--disable-auto-launch"]
        with log.open("w") as file:
            process = subprocess.Popen(words, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
        try:
            server = Server(folder, log)
            for _ in range(START_S):
                with contextlib.suppress(aiohttp.ClientError):
                    await server.get("/system_stats")
                    break
                if process.poll() is not None:
                    raise SystemExit(f"ComfyUI did not start:\n{log.read_text()[-3000:]}")
                await asyncio.sleep(1)
            yield server
        finally:
            process.terminate()
            process.wait()


class Checks:
    """Prints one line per check."""

    def __init__(self) -> None:
        self.failed = 0

    def __call__(self, name: str, holds: bool, detail: object = "") -> None:
        self.failed += not holds
        print(f"{'ok    ' if holds else 'FAILED'} {name}{f': {detail}' if detail != '' else ''}", flush=True)


async def check_nodes(server: Server, check: Checks) -> dict[str, Any]:
    info = await server.get("/object_info")
    ours = sorted(name for name in info if name.startswith("Scail2"))
    check("nodes under /object_info", len(ours) == 5, ", ".join(ours))
    templates = await server.get("/api/workflow_templates")
    listed = templates.get("scail2_rt", [])
    check("templates of the pack", sorted(listed) == ["scail2_animate", "scail2_replace"], listed)
    return dict(info)


def load_prompt(server: Server, mode: str, info: dict[str, Any]) -> dict[str, Any]:
    file = server.folder / "custom_nodes" / "scail2_rt" / "example_workflows" / f"scail2_{mode}.json"
    return prompt_of(json.loads(file.read_text(encoding="utf-8")), info)


def of_type(prompt: dict[str, Any], kind: str) -> dict[str, Any]:
    """The inputs of the node of this type."""
    return next(node["inputs"] for node in prompt.values() if node["class_type"] == kind)


async def check_workflow(server: Server, check: Checks, mode: str, prompt: dict[str, Any]) -> None:
    run = await server.run(prompt)
    status = run.history.get("status", {}).get("status_str")
    check(f"{mode}: runs to its end", status == "success", f"{run.seconds:.1f} s")
    if status != "success":
        print(said_of(run))
        return
    check(f"{mode}: progress rises to 1", run.shares == sorted(run.shares) and run.shares[-1] == 1, len(run.shares))
    check(f"{mode}: preview frames", run.previews > 0, run.previews)
    check(f"{mode}: findings are told in the nodes", any("masks can be used" in text for text in run.texts))
    (number,) = (key for key, node in prompt.items() if node["class_type"] == "SaveVideo")
    saved = run.history["outputs"][number]["images"][0]
    path = server.folder / "output" / saved["subfolder"] / saved["filename"]
    truth = render_case(make_scene(mode, 0)).truth
    with VideoReader(path) as reader:
        frames = reader.read(1000)
    check(f"{mode}: frames", frames.shape == truth.shape, frames.shape)
    quality = psnr(frames, truth)
    check(f"{mode}: PSNR against the truth is above 22 dB", quality > 22, f"{quality:.1f} dB")
    with av.open(str(path)) as container:
        sound = sum(frame.samples / frame.sample_rate for frame in container.decode(audio=0))
    check(f"{mode}: the driving clip's sound", abs(sound - len(truth) / 16) < 0.1, f"{sound:.2f} s")
    again = await server.run(prompt)
    cached = set(again.data("execution_cached")[0]["nodes"])
    check(f"{mode}: the same inputs come from the cache", cached == set(prompt), f"{again.seconds:.2f} s")


async def check_warm(server: Server, check: Checks, prompt: dict[str, Any]) -> None:
    await server.run(prompt)
    opened = count(server, "opened")
    of_type(prompt, "Scail2Animate")["seed"] = 1
    run = await server.run(prompt)
    check("another seed: engines stay open", count(server, "opened") == opened, f"{run.seconds:.1f} s")
    cached = run.data("execution_cached")[0]["nodes"]
    check("another seed: masks come from the cache", len(cached) == len(prompt) - 3, cached)
    await server.post("/free", {"unload_models": True})
    for _ in range(100):
        if count(server, "closed"):
            break
        await asyncio.sleep(0.1)
    check("unload models: engines are closed", count(server, "closed") == 1)
    of_type(prompt, "Scail2Animate")["seed"] = 2
    await server.run(prompt)
    check("the next run opens them again", count(server, "opened") == opened + 1)


def count(server: Server, word: str) -> int:
    return len(re.findall(rf"SCAIL-2: engines.* {word}", server.log.read_text()))


async def check_cancel(server: Server, check: Checks, prompt: dict[str, Any]) -> None:
    inputs = of_type(prompt, "Scail2Animate")
    inputs |= {"steps": 40, "seed": 3}
    pressed: list[float] = []

    async def press(share: float) -> None:
        if share > 0.1 and not pressed:
            pressed.append(share)
            await server.post("/interrupt")

    run = await server.run(prompt, press)
    check("cancel: the prompt is interrupted", bool(run.data("execution_interrupted")))
    after = [share for share in run.shares if share > pressed[0]]
    check("cancel: within one step", len(set(after)) <= 1, f"pressed at {pressed[0]:.3f}, went on to {after[-1:]}")
    inputs |= {"steps": 2, "seed": 4}
    again = await server.run(prompt)
    check("cancel: the next run works", bool(again.data("execution_success")))


def said_of(run: Run) -> str:
    """The error that the page shows; "" if there is none."""
    errors = [error["exception_message"].strip() for error in run.data("execution_error")]
    return " ".join([*errors, *map(json.dumps, run.data("refused"))])


async def check_broken(server: Server, check: Checks, prompt: dict[str, Any]) -> None:
    async def error_of(**changes: Any) -> str:
        broken = json.loads(json.dumps(prompt))
        for kind, inputs in changes.items():
            of_type(broken, kind).update(inputs)
        run = await server.run(broken)
        return said_of(run)

    said = await error_of(Scail2Engines={"folder": "the path below", "path": "/nowhere"})
    check("broken: no engines", "/nowhere has no engines" in said, said)
    said = await error_of(Scail2Animate={"start": 500})
    check("broken: start beyond the end", said.startswith("start 500 is beyond the end"), said)
    said = await error_of(Scail2Animate={"width": 100, "height": 0})
    check("broken: half a size", "Give both" in said, said)
    other = json.loads(json.dumps(prompt))
    for node in other.values():
        if node["inputs"].get("file", "").endswith("driving_mask.mp4"):
            node["inputs"]["file"] = node["inputs"]["file"].replace("_mask", "")
    run = await server.run(other)
    said = said_of(run)
    named = "is not one of the mask colours" in said or "more than six characters" in said
    check("broken: a driving clip in place of its mask", named, said[:300])


async def check_tensors(server: Server, check: Checks, prompt: dict[str, Any]) -> None:
    """The same graph with batches of images in place of VIDEO: tensors in, tensors out."""
    for number, node in list(prompt.items()):
        if node["class_type"] == "LoadVideo":
            prompt[f"{number}0"] = {"class_type": "GetVideoComponents", "inputs": {"video": [number, 0]}}
            for other in prompt.values():
                inputs = other["inputs"]
                if other["class_type"] != "GetVideoComponents":
                    inputs.update({key: [f"{number}0", 0] for key, link in inputs.items() if link == [number, 0]})
    run = await server.run(prompt)
    check("batches of images in place of videos", bool(run.data("execution_success")), f"{run.seconds:.1f} s")


async def check_segmenter(server: Server, check: Checks, prompt: dict[str, Any]) -> None:
    """No masks connected: the small segmenter that comes with the package makes them, from boxes."""
    case = render_case(make_scene("animate", 0), (256, 256))
    boxes = [f"image:{box_of(case.reference_mask)}", box_of(case.driving_mask[0])]
    inputs = of_type(prompt, "Scail2Masks")
    del inputs["reference_mask"], inputs["driving_mask"]
    inputs |= {"boxes": " ".join(boxes), "segmenter_weights": str(shipped_segmenter()), "max_characters": 1}
    run = await server.run(prompt)
    detail = said_of(run) or f"{run.seconds:.1f} s"
    check("masks made inside", bool(run.data("execution_success")), detail)


def box_of(mask: np.ndarray) -> str:
    """Around the character of a colour mask."""
    ys, xs = np.nonzero(mask.max(-1) != mask.min(-1))
    return f"{xs.min()},{ys.min()},{xs.max() + 1},{ys.max() + 1}"


async def check_build(server: Server, check: Checks, prompt: dict[str, Any]) -> None:
    """Builds engines from files in ComfyUI's model folders, which are removed afterwards."""
    models = server.folder / "models"
    number = next(key for key, node in prompt.items() if node["class_type"] == "Scail2Engines")
    tokenizer = SPRITES / "umt5-xxl" / "tokenizer.json"
    inputs = {"checkpoint": "scail2_rt_trial.safetensors", "tokenizer": str(tokenizer), "precision": "fp32"}
    inputs |= {"vae": "auto", "umt5": "auto", "clip": "auto", "backend": "torch", "attention": "auto"}
    prompt[number] = {"class_type": "Scail2BuildEngines", "inputs": {**inputs, "vram_limit_gib": 0.0}}
    with comfyui_files(models):
        run = await server.run(prompt)
        detail = said_of(run) or f"{run.seconds:.1f} s"
        check("build: engines of ComfyUI's files animate", bool(run.data("execution_success")), detail)
        folders = list((models / "scail2_rt").glob("scail2_rt_trial-*"))
        check("build: one folder, kept by content", len(folders) == 1, [folder.name for folder in folders])
    for folder in folders:
        shutil.rmtree(folder)
    (models / "scail2_rt" / "hashes.json").unlink(missing_ok=True)


@contextlib.contextmanager
def comfyui_files(models: Path) -> Iterator[None]:
    """The sprite checkpoint as files of ComfyUI's model folders."""
    sources = open_checkpoint(SPRITES).sources
    made = {
        "diffusion_models/scail2_rt_trial.safetensors": tensors_of(sources["dit"]),
        "vae/scail2_rt_trial_vae.safetensors": tensors_of(sources["vae"]),
        "text_encoders/scail2_rt_trial_umt5.safetensors": hugging_face_umt5(tensors_of(sources["umt5"])),
        "clip_vision/scail2_rt_trial_clip.safetensors": hugging_face_clip(tensors_of(sources["clip"])),
    }
    try:
        for name, tensors in made.items():
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, models / name)
        shutil.copy(SPRITES / "config.json", models / CONFIG)  # the heads of the small model are of another width
        yield
    finally:
        for name in (*made, CONFIG):
            (models / name).unlink(missing_ok=True)


async def check_page(server: Server, check: Checks, shots: Path) -> None:
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium())
        page = await browser.new_page(viewport={"width": 1900, "height": 1200})
        await page.goto(f"http://{ADDRESS}")
        await page.wait_for_function("window.app?.graph !== undefined && window.app.extensionManager")
        await page.wait_for_timeout(2000)
        if not await page.get_by_text("scail2_rt").count():  # a new user is shown the templates at once
            await page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        await page.get_by_text("scail2_rt").first.click()
        await page.wait_for_timeout(1500)
        await page.screenshot(path=shots / "templates.png")
        await page.keyboard.press("Escape")
        for mode in WORKFLOWS:
            file = server.folder / "custom_nodes" / "scail2_rt" / "example_workflows" / f"scail2_{mode}.json"
            await page.evaluate("async graph => { await app.loadGraphData(graph) }", json.loads(file.read_text()))
            await page.wait_for_timeout(1500)
            made = await page.evaluate("async () => (await app.graphToPrompt()).output")
            expected = load_prompt(server, mode, await server.get("/object_info"))
            check(f"page: {mode} is the same prompt", made_equal(made, expected))
            await page.evaluate("async () => { await app.queuePrompt(0) }")
            for _ in range(600):
                queue = await server.get("/queue")
                if not (queue["queue_running"] or queue["queue_pending"]):
                    break
                await asyncio.sleep(0.5)
            await page.wait_for_timeout(2500)
            await page.keyboard.press(".")  # fit the complete graph in the window
            await page.wait_for_timeout(1500)
            await page.screenshot(path=shots / f"{mode}.png")
            errors = await page.evaluate("Object.keys(app.lastNodeErrors ?? {}).length")
            check(f"page: {mode} has no error", errors == 0, shots / f"{mode}.png")
        await browser.close()


def made_equal(made: dict[str, Any], expected: dict[str, Any]) -> bool:
    """The page adds inputs for the widgets that it shows in nodes."""
    if set(made) != set(expected):
        return False
    return all(made[key]["inputs"].items() >= node["inputs"].items() for key, node in expected.items())


def chromium() -> str | None:
    """Debian's Chromium, if playwright has not installed one."""
    return next((str(path) for path in (Path("/usr/bin/chromium"),) if path.exists()), None)


async def main(folder: Path, page: bool, only: str | None) -> int:
    check = Checks()
    async with serving(folder) as server:
        info = await check_nodes(server, check)
        if only == "page":
            await check_page(server, check, Path(tempfile.mkdtemp(prefix="scail2-page-")))
            return check.failed
        if only:
            await globals()[f"check_{only}"](server, check, load_prompt(server, "animate", info))
            return check.failed
        for mode in WORKFLOWS:
            await check_workflow(server, check, mode, load_prompt(server, mode, info))
        await check_warm(server, check, load_prompt(server, "animate", info))
        await check_cancel(server, check, load_prompt(server, "animate", info))
        await check_broken(server, check, load_prompt(server, "animate", info))
        await check_tensors(server, check, load_prompt(server, "animate", info))
        await check_build(server, check, load_prompt(server, "animate", info))
        await check_segmenter(server, check, load_prompt(server, "animate", info))
        if page:
            shots = Path(tempfile.mkdtemp(prefix="scail2-page-"))
            await check_page(server, check, shots)
        if check.failed:
            print(server.log.read_text()[-4000:])
    return check.failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--only", choices=("warm", "cancel", "broken", "tensors", "build", "segmenter", "page"))
    given = parser.parse_args()
    sys.exit(1 if asyncio.run(main(given.folder.absolute(), given.page, given.only)) else 0)
