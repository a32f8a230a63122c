"""Long tests (`make soak`): kills at random times, and hours of requests, some of them hostile.

`SCAIL2_SOAK_KILLS` and `SCAIL2_SOAK_S` shorten them."""

import contextlib
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import sabotage
from tests.support.served import SMALL, Served, serving

pytest_plugins = ["tests.support.runtime_fixtures"]
pytestmark = pytest.mark.soak
KILLS = int(os.environ.get("SCAIL2_SOAK_KILLS", "500"))
SECONDS = float(os.environ.get("SCAIL2_SOAK_S", "1800"))

# Every completed run appends a line: the folder of its job.
COUNT = """
import os
from scail2_rt.runtime.session import write
complete = write._Run.complete
def counted(self, resumed):
    line = f"{self.output.path.parent.name}\\n".encode()
    file = os.open(os.environ["SOAK_ENDS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line)
    os.close(file)
    return complete(self, resumed)
write._Run.complete = counted
"""


def test_kills_at_random_moments(engines: Path, case: Path, cache: Path, tmp_path: Path) -> None:
    """Kill the worker, and sometimes the server: every job completes once, with the same result as without kills."""
    jobs, seeds, rng = max(1, KILLS // 5), 5, random.Random(7)
    settings = {**SMALL, "segment_length": "9", "steps": "40"}
    (tmp_path / "sabotage").mkdir()
    ends = tmp_path / "ends"
    with serving(engines, tmp_path / "plain", cache) as plain:
        body = plain.case(case, **settings)
        expected = {}
        for seed in range(seeds):
            expected[seed] = plain.content(plain.done(plain.post({**body, "seed": seed})["id"])["id"])
    own = Served(engines, tmp_path / "data", cache)
    own._environment |= {**sabotage(tmp_path / "sabotage", COUNT), "SOAK_ENDS": str(ends)}
    own.start()
    try:
        body = own.case(case, **settings)
        made = {own.post({**body, "seed": number % seeds})["id"]: number % seeds for number in range(jobs)}
        kills = {"worker": 0, "server": 0}
        while sum(kills.values()) < KILLS:
            time.sleep(rng.uniform(0.0, 1.5))
            left = [video_id for video_id in made if own.video(video_id)["status"] in ("queued", "in_progress")]
            while len(left) < 3:  # there is always something to disturb
                seed = len(made) % seeds
                left.append(own.post({**body, "seed": seed})["id"])
                made[left[-1]] = seed
            workers = own.children()
            if rng.random() < 0.3:
                own.kill()
                own.start()
                kills["server"] += 1
            elif workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(workers[0], signal.SIGKILL)
                kills["worker"] += 1
        for video_id, seed in made.items():
            own.done(video_id, timeout_s=600)
            assert own.content(video_id) == expected[seed], video_id
        ended = ends.read_text().split()
        assert len(ended) == len(set(ended))
        assert set(ended) <= set(made)
        assert len(ended) >= len(made) - sum(kills.values())
        print(f"{kills}: {len(made)} jobs, each done once and whole; {len(ended)} ends were seen")
    finally:
        own.kill()


def open_files(process: int) -> int:
    return len(list(Path(f"/proc/{process}/fd").iterdir()))


def resident_mb(process: int) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


class Clients:
    """The kinds of requests to the service. Each method raises for a wrong answer."""

    def __init__(self, own: Served, case: Path, body: dict[str, Any]) -> None:
        self.own, self.case, self.body = own, case, body
        self.rng = random.Random(3)

    def whole(self) -> None:
        video = self.own.done(self.own.post({**self.body, "seed": self.rng.randrange(99)})["id"], timeout_s=600)
        assert self.own.content(video["id"])[4:8] == b"ftyp"
        assert self.own.ask("DELETE", f"/v1/videos/{video['id']}").status == 200

    def given_up(self) -> None:
        video = self.own.post({**self.body, "steps": "500"})
        time.sleep(self.rng.uniform(0, 1))
        assert self.own.ask("DELETE", f"/v1/videos/{video['id']}").status == 200

    def looking(self) -> None:
        for path in ("/v1/videos?limit=100", "/health", "/metrics", "/v1/files", "/"):
            assert self.own.ask("GET", path).status == 200

    def upload(self) -> None:
        file = self.own.upload(self.case / "rendered_v2.mp4")
        assert self.own.ask("DELETE", f"/v1/files/{file}").status == 200

    def oversize(self) -> None:
        with contextlib.suppress(OSError):  # it may close while we still send
            answer = self.own.ask("POST", "/v1/files", b"x" * (9 << 20), Content_Type="multipart/form-data; boundary=b")
            assert answer.status in (400, 413)

    def truncated(self) -> None:
        data = (self.case / "rendered_v2.mp4").read_bytes()[: self.rng.randrange(1, 3000)]
        file = self.own.client().files.create(file=("x", data), purpose="vision").id
        assert self.own.ask("POST", "/v1/videos", {**self.body, "video_reference": {"file_id": file}}).status == 400
        self.own.ask("DELETE", f"/v1/files/{file}")

    def wrong_types(self) -> None:
        for change in ({"steps": "x"}, {"size": []}, {"prompt": {}}, {"seed": 10**30}, {"extra_refs": 1}):
            assert self.own.ask("POST", "/v1/videos", {**self.body, **change}).status == 400

    def traversal(self) -> None:
        for path in ("/v1/files/..%2f..%2fservice.sqlite/content", "/page/..%2f..%2fapi.py", "/v1/videos/%00/content"):
            assert self.own.ask("GET", path).status == 404

    def slow_or_broken_off(self) -> None:
        host, port = self.own.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 30) as client:
            client.sendall(f"POST /v1/files HTTP/1.1\r\nHost: {host}:{port}\r\n".encode())
            client.sendall(b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 99999\r\n\r\n--b\r\n")
            client.sendall(b'Content-Disposition: form-data; name="file"; filename="f"\r\n\r\nhalf')
            time.sleep(self.rng.uniform(0, 3))


def test_mixed_load_with_hostile_clients(engines: Path, case: Path, cache: Path, tmp_path: Path) -> None:
    """After half an hour, memory, open files and processes are as after the first minutes, and no file is left."""
    with serving(engines, tmp_path / "data", cache, "--max-upload", "8MiB") as own:
        clients = Clients(own, case, own.case(case))
        good: list[Callable[[], None]] = [clients.whole, clients.given_up, clients.looking, clients.upload]
        hostile = [clients.oversize, clients.truncated, clients.wrong_types, clients.traversal]
        hostile.append(clients.slow_or_broken_off)
        faults: list[str] = []
        done = {act.__name__: 0 for act in (*good, *hostile)}
        end = time.monotonic() + SECONDS

        def come(number: int) -> None:
            rng = random.Random(number)
            while time.monotonic() < end and not faults:
                act = rng.choice(hostile if rng.random() < 0.1 else good)
                try:
                    act()
                except Exception as error:
                    faults.append(f"{act.__name__}: {type(error).__name__}: {error}")
                done[act.__name__] += 1

        threads = [threading.Thread(target=come, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        assert own.process is not None
        processes = [own.process.pid, *own.children(), *own.children("check_process")]
        time.sleep(SECONDS / 5)
        before = [resident_mb(process) for process in processes]
        for thread in threads:
            thread.join(600)
        assert faults == []
        time.sleep(2)
        assert processes == [own.process.pid, *own.children(), *own.children("check_process")]
        after = [resident_mb(process) for process in processes]
        files = [open_files(process) for process in processes]
        print(f"{done}; MB {before} → {after}; open files {files}")
        assert all(now - then < 50 for then, now in zip(before, after, strict=True))
        assert all(number < 60 for number in files)
        assert list((own.data / "incoming").iterdir()) == []
        assert list((own.data / "jobs").iterdir()) == []
        assert len(list((own.data / "files").iterdir())) == 4
