"""The part of ComfyUI's HTTP interface that scripts use, in front of the nodes on their stand-ins.

`POST /prompt` runs a graph in API form at once and answers with its id; `GET /history/ID` has what came of it. A
required input that a graph lacks is refused, as ComfyUI does."""

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from scail2_rt.runtime.media.images import load_image
from tests.support.comfyui_standins import VideoFromFile


class Graphs:
    """Runs graphs on files of `inputs`. made: the value that each `SaveVideo` was given, by prompt id; changes: of what
    the graph says, by class."""

    def __init__(self, nodes: ModuleType, inputs: Path, changes: Mapping[str, Mapping[str, Any]]) -> None:
        self.classes = {node.define_schema().node_id: node for node in nodes.NODES}
        self.inputs, self.changes = inputs, changes
        self.made: dict[str, Any] = {}

    def run(self, graph: Mapping[str, Any]) -> str:
        prompt_id = f"prompt-{len(self.made)}"
        done: dict[str, tuple[Any, ...]] = {}

        def outputs(number: str) -> tuple[Any, ...]:
            if number not in done:
                node = graph[number]
                given = {
                    name: outputs(value[0])[value[1]] if isinstance(value, list) else value
                    for name, value in node["inputs"].items()
                }
                done[number] = self.node(node["class_type"], {**given, **self.changes.get(node["class_type"], {})})
            return done[number]

        for number, node in graph.items():
            if node["class_type"] == "SaveVideo":
                (self.made[prompt_id],) = outputs(number)
        return prompt_id

    def node(self, kind: str, given: dict[str, Any]) -> tuple[Any, ...]:
        if kind == "LoadImage":
            return (torch.from_numpy(load_image(self.inputs / given["image"]))[None] / 255,)
        if kind == "LoadVideo":
            return (VideoFromFile(str(self.inputs / given["file"])),)
        if kind == "SaveVideo":
            assert {"filename_prefix", "format", "codec"} <= set(given)
            return (given["video"],)
        schema = self.classes[kind].define_schema()
        required = {i.id for i in schema.inputs if not getattr(i, "optional", False)}
        assert required <= set(given) <= {i.id for i in schema.inputs}, f"{kind}: {required ^ set(given)}"
        return tuple(self.classes[kind].execute(**given).args)


@contextlib.contextmanager
def answering(graphs: Graphs) -> Iterator[str]:
    """The address of a server for them."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self, document: Any) -> None:
            body = json.dumps(document).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            assert self.path == "/prompt"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer({"prompt_id": graphs.run(body["prompt"]), "number": 1, "node_errors": {}})

        def do_GET(self) -> None:
            prompt_id = self.path.removeprefix("/history/")
            file = {"filename": "scail2_00001_.mp4", "subfolder": "video", "type": "output"}
            run = {"status": {"status_str": "success"}, "outputs": {"9": {"images": [file], "animated": [True]}}}
            self.answer({prompt_id: run} if prompt_id in graphs.made else {})

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
