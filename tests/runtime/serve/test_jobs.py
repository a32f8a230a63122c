"""Known problems of other services, and kills: each job ends correctly, once, and does not affect other jobs."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from scail2_rt.runtime.media.unfinished import resumable
from tests.support.command import sabotage
from tests.support.served import LONG, SMALL, Served, alive, serving, wait_for

pytest_plugins = ["tests.support.runtime_fixtures"]


def running(video: dict[str, Any]) -> bool:
    return video["status"] == "in_progress"


def test_states_tell_the_truth_and_delete_frees_the_worker(served: Served, body: dict[str, Any]) -> None:
    """A job is queued with its position, then in progress from the first step on; a deleted job ends within one step,
    or at once if queued, and the next one begins."""
    first, second, third = (served.post({**body, **LONG, "seed": seed}) for seed in range(3))
    seen = served.wait(first["id"], running)
    assert seen["phase"] == "denoise"
    assert seen["started_at"] >= seen["created_at"]
    assert [served.video(video["id"])["queue_position"] for video in (second, third)] == [1, 2]
    assert served.video(second["id"])["status"] == "queued"
    assert served.ask("GET", f"/v1/videos/{first['id']}/content").status == 404
    assert served.ask("DELETE", f"/v1/videos/{second['id']}").json["deleted"]
    assert served.video(third["id"])["queue_position"] == 1
    folder = served.data / "jobs" / first["id"]
    moment = time.monotonic()
    assert served.ask("DELETE", f"/v1/videos/{first['id']}").status == 200
    assert served.ask("GET", f"/v1/videos/{first['id']}").status == 404
    served.wait(third["id"], running)
    assert time.monotonic() - moment < 30
    wait_for(lambda: not folder.exists())
    assert served.ask("DELETE", f"/v1/videos/{third['id']}").status == 200
    served.done(served.post(body)["id"])


def test_a_client_that_leaves_ends_nothing(served: Served, body: dict[str, Any]) -> None:
    """Neither an aborted request that waits for its video nor a closed event stream ends the job."""
    import http.client

    host, port = served.url.removeprefix("http://").split(":")
    before = {video["id"] for video in served.ask("GET", "/v1/videos").json["data"]}
    waiting = http.client.HTTPConnection(host, int(port))
    waiting.request("POST", "/v1/videos/sync", json.dumps(body), {"Content-Type": "application/json"})
    wait_for(lambda: len(served.ask("GET", "/v1/videos").json["data"]) > len(before))
    waiting.close()
    (left,) = {video["id"] for video in served.ask("GET", "/v1/videos").json["data"]} - before
    stream = http.client.HTTPConnection(host, int(port))
    stream.request("GET", f"/v1/videos/{left}/events")
    stream.getresponse().read1(10)
    stream.close()
    assert served.done(left)["frames"] == 21


def test_the_same_idempotency_key_is_the_same_job(served: Served, body: dict[str, Any]) -> None:
    first = served.post(body, Idempotency_Key="one")
    again = served.post(body, Idempotency_Key="one")
    assert first["id"] == again["id"]
    other = served.ask("POST", "/v1/videos", {**body, "seed": 9}, Idempotency_Key="one")
    assert (other.status, other.json["error"]["code"]) == (409, "idempotency_key_reused")
    assert served.post(body, Idempotency_Key="two")["id"] != first["id"]
    assert len([path for path in (served.data / "jobs").iterdir() if path.name == first["id"]]) == 1


def test_settings_do_not_leak_into_the_next_job(served: Served, body: dict[str, Any]) -> None:
    plain = served.post(body)
    changed = served.post({**body, "guidance": 3, "scheduler": "euler", "anchor_color": "first", "seed": 5, "crf": 30})
    again = served.post(body)
    videos = [served.content(served.done(video["id"])["id"]) for video in (plain, changed, again)]
    assert videos[0] == videos[2]
    assert videos[0] != videos[1]


def test_three_kills_and_the_video_is_the_same(
    engines: Path, case: Path, cache: Path, tmp_path: Path, served: Served, body: dict[str, Any]
) -> None:
    """Kill the worker, the server and the worker again: finished segments are kept and the others are made once."""
    settings = {**SMALL, "segment_length": "9", "steps": "60"}  # four segments
    expected = served.content(served.done(served.post({**body, **settings})["id"])["id"])
    with serving(engines, tmp_path / "data", cache) as own:
        video = own.post(own.case(case, **settings))
        waiting = [own.post(own.case(case, **SMALL)) for _ in range(2)]
        output = own.data / "jobs" / video["id"] / "video.mp4"

        wait_for(lambda: resumable(output) >= 1, 120)
        (worker,) = own.children()
        os.kill(worker, signal.SIGKILL)
        own.wait(video["id"], lambda video: video["status"] == "queued")
        wait_for(lambda: resumable(output) >= 2, 120)
        (worker,) = own.children()
        own.kill()
        wait_for(lambda: not alive(worker))
        assert resumable(output) >= 2
        own.start()
        assert own.video(waiting[0]["id"])["status"] == "queued"
        wait_for(lambda: resumable(output) >= 3, 120)
        os.kill(*own.children(), signal.SIGKILL)
        assert own.done(video["id"])["error"] is None
        assert own.content(video["id"]) == expected
        report = json.loads(own.content(video["id"], "report"))
        assert report["resumed_after_segments"] >= 2
        for other in waiting:
            own.done(other["id"])
        left = {path.name for path in output.parent.iterdir()}
        inputs = {"input_reference", "mask_reference", "video_mask_reference", "video_reference"}
        assert left == inputs | {"plan", "video.json", "video.mp4"}


# The fault in a job, after its first step, by the job's seed.
FAULTS = """
import os
from scail2_rt.runtime.core import progress
from scail2_rt.runtime.pipeline.finite import NotFinite
from scail2_rt.runtime.session import session
step, frames, seed = progress.RunProgress.step, session.Session.frames, []
def began(self, plan, *more):
    seed[:] = [plan.request.seed]
    return frames(self, plan, *more)
def broken(self, index):
    step(self, index)
    if seed == [101]:
        os.abort()
    if seed == [102]:
        raise MemoryError("Unable to allocate 7.00 GiB for an array")
    if seed == [103]:
        raise RuntimeError("what nobody thought of")
    if seed == [104]:
        raise NotFinite("The picture is not a number from step 1 on.")
session.Session.frames, progress.RunProgress.step = began, broken
"""


def test_faults_stay_with_their_job(engines: Path, case: Path, cache: Path, tmp_path: Path) -> None:
    """Memory runs out, NaN, an internal error, a worker that crashes: the job fails with the reason; the next runs."""
    folder = tmp_path / "sabotage"
    folder.mkdir()
    own = Served(engines, tmp_path / "data", cache)
    own._environment |= sabotage(folder, FAULTS)
    try:
        own.start()
        body = own.case(case)
        seeds = (101, 0, 102, 103, 104, 1)
        made = {seed: own.post({**body, "seed": seed})["id"] for seed in seeds}
        for seed in (0, 1):
            own.done(made[seed])
        said = {seed: own.done(made[seed], "failed")["error"] for seed in (101, 102, 103, 104)}
        assert said[101]["code"] == "worker_died"
        assert "signal 6 (SIGABRT) in the phase denoise" in said[101]["message"]
        assert said[102] == {
            "code": "out_of_memory",
            "message": "Host memory ran out in the phase denoise, which requested another 7.00 GiB: use a "
            "smaller --size, --segment-length or --max-rows.",
        }
        assert said[103] == {"code": "fault", "message": "RuntimeError: what nobody thought of"}
        assert said[104]["message"] == "The picture is not a number from step 1 on."
        answer = own.ask("GET", f"/v1/videos/{made[102]}/content")
        assert (answer.status, answer.error) == (422, said[102]["message"])
        metrics = own.ask("GET", "/metrics").body.decode()
        assert 'scail2_failures_total{kind="crash"} 1.0' in metrics
    finally:
        own.kill()


def test_two_workers_have_a_job_each(engines: Path, case: Path, cache: Path, tmp_path: Path) -> None:
    """Two workers, as with two GPUs: the death of one does not affect the other's job."""
    (tmp_path / "two").mkdir()
    own = Served(engines, tmp_path / "data", cache)
    two = "from scail2_rt.runtime.serve import launch\nlaunch.workers_of = lambda *_: 2\n"
    own._environment |= sabotage(tmp_path / "two", two)
    try:
        own.start()
        body = own.case(case, **LONG)
        wait_for(lambda: b"scail2_workers_ready 2.0" in own.ask("GET", "/metrics").body)
        made = [own.post({**body, "seed": seed})["id"] for seed in range(3)]
        for video_id in made[:2]:
            own.wait(video_id, running)
        assert own.video(made[2])["status"] == "queued"
        os.kill(own.children()[0], signal.SIGKILL)
        wait_for(lambda: [own.video(video_id)["status"] for video_id in made[:2]].count("queued") == 1)
        assert [own.video(video_id)["status"] for video_id in made[:2]].count("in_progress") == 1
        for video_id in made[:2]:
            own.wait(video_id, running)
    finally:
        own.kill()


def test_a_second_server_of_a_folder_and_engines_that_cannot_open_are_refused(
    served: Served, engines: Path, installed: Any, tmp_path: Path
) -> None:
    again = installed("serve", engines, "--data", served.data, "--port", "0")
    assert again.returncode == 2
    assert f"error: Another service uses {served.data}" in again.stderr
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_text("{}")
    told = installed("serve", broken, "--data", tmp_path / "data", "--port", "0")
    assert told.returncode == 2, told.stderr
    assert "error: " in told.stderr
    assert "Traceback" not in told.stderr
    assert installed("serve", tmp_path, "--data", tmp_path / "data").returncode == 2


def test_stopping_leaves_the_queue_and_no_process(engines: Path, case: Path, cache: Path, tmp_path: Path) -> None:
    with serving(engines, tmp_path / "data", cache) as own:
        video = own.post(own.case(case, **LONG))
        own.wait(video["id"], running)
        processes = own.children() + own.children("check_process")
        assert len(processes) == 2
        assert own.stop() == 0
        wait_for(lambda: not any(alive(process) for process in processes))
        assert "Traceback" not in own.log
        own.start()
        own.wait(video["id"], running)
        assert own.ask("DELETE", f"/v1/videos/{video['id']}").status == 200


@pytest.mark.parametrize("option", [("--host", "0.0.0.0"), ("--gpus", "3"), ("--port", "70000"), ("--keep", "soon")])
def test_options_that_cannot_be(installed: Any, engines: Path, tmp_path: Path, option: tuple[str, str]) -> None:
    told = installed("serve", engines, "--data", tmp_path / "data", *option)
    assert told.returncode == 2
    assert option[0] in told.stderr.splitlines()[-1]
    assert not (tmp_path / "data").exists()
