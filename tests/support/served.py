"""A running service: the installed command, with HTTP requests, stopping and killing."""

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from tests.support.command import SCAIL2_RT, command_environment, unmeasured

INPUTS = {
    "input_reference": "ref.png",
    "mask_reference": "ref_mask.png",
    "video_reference": "rendered_v2.mp4",
    "video_mask_reference": "rendered_mask_v2.mp4",
}
SMALL = {"size": "96x64", "steps": "2", "segment_length": "13", "guidance": "1"}
LONG = {**SMALL, "steps": "1000"}  # two segments of some ten seconds


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The sentence of a refusal."""
        return str(self.json["error"]["message"])


def lower(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


class Served:
    """One data folder, served by processes that come and go."""

    def __init__(self, engines: Path, data: Path, cache: Path, *options: str, measured: bool = False) -> None:
        self.data, self.url = data, ""
        self._words = [str(SCAIL2_RT), "serve", str(engines), "--data", str(data), "--port", "0", *options]
        self._environment = command_environment(cache)
        if not measured:  # is killed
            self._environment = unmeasured(self._environment)
        self._log = data.parent / f"{data.name}.log"
        self.process: subprocess.Popen[str] | None = None
        self.key: str | None = None

    def start(self) -> "Served":
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                self._words, stdout=subprocess.PIPE, stderr=log, text=True, env=self._environment
            )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://"), self.log
        return self

    @property
    def log(self) -> str:
        return self._log.read_text()

    def stop(self) -> int:
        """Stop it as the system does at shutdown."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self._closed()
        return code

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self._closed()

    def _closed(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        self.process.stdout.close()

    def children(self, module: str = "worker") -> list[int]:
        """Process ids of its workers, or of its check process."""
        assert self.process is not None
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                parent = int(path.read_text().rpartition(")")[2].split()[1])
                words = path.with_name("cmdline").read_bytes().split(b"\0")
                if parent == self.process.pid and f"scail2_rt.runtime.serve.{module}".encode() in words:
                    found.append(int(path.parent.name))
        return found

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(api_key=self.key or "none", base_url=f"{self.url}/v1", max_retries=0)

    def ask(self, method: str, path: str, body: bytes | Mapping[str, Any] | None = None, **headers: str) -> Answer:
        """One request; a mapping is sent as JSON. Header names have _ for -."""
        told = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.key is not None:
            told.setdefault("Authorization", f"Bearer {self.key}")
        if isinstance(body, Mapping):
            body, told["Content-Type"] = json.dumps(body).encode(), "application/json"
        request = urllib.request.Request(self.url + path, body, told, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return Answer(response.status, lower(response.headers), response.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, lower(error.headers), error.read())

    def upload(self, file: Path, name: str | None = None) -> str:
        with file.open("rb") as data:
            return self.client().files.create(file=(name or file.name, data), purpose="vision").id

    def case(self, folder: Path, **changes: Any) -> dict[str, Any]:
        """A JSON body: the inputs of a case as uploaded files, and small settings."""
        files = {name: {"file_id": self.upload(folder / file)} for name, file in INPUTS.items()}
        return {**files, "prompt": "a man walks", **SMALL, **changes}

    def post(self, body: Mapping[str, Any], **headers: str) -> dict[str, Any]:
        answer = self.ask("POST", "/v1/videos", body, **headers)
        assert answer.status == 200, answer.body
        return dict(answer.json)

    def video(self, video_id: str) -> dict[str, Any]:
        answer = self.ask("GET", f"/v1/videos/{video_id}")
        assert answer.status == 200, answer.body
        return dict(answer.json)

    def wait(self, video_id: str, until: Callable[[dict[str, Any]], bool], timeout_s: float = 120) -> dict[str, Any]:
        """Wait until a condition is true for the video object, and return it."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            video = self.video(video_id)
            if until(video):
                return video
            time.sleep(0.05)
        raise AssertionError(f"{video_id} did not get there in {timeout_s} s: {video}\n{self.log}")

    def done(self, video_id: str, status: str = "completed", timeout_s: float = 120) -> dict[str, Any]:
        video = self.wait(video_id, lambda video: video["status"] in ("completed", "failed"), timeout_s)
        assert video["status"] == status, video
        return video

    def content(self, video_id: str, variant: str = "video") -> bytes:
        answer = self.ask("GET", f"/v1/videos/{video_id}/content?variant={variant}")
        assert answer.status == 200, answer.body
        return answer.body


@contextlib.contextmanager
def serving(engines: Path, data: Path, cache: Path, *options: str, measured: bool = False) -> Iterator[Served]:
    """A running service; all its processes are stopped afterwards."""
    served = Served(engines, data, cache, *options, measured=measured).start()
    try:
        yield served
    finally:
        if served.process is not None and served.process.poll() is None:
            if measured:
                served.stop()
            else:
                served.kill()


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not count."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False


def wait_for(true: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.05)
