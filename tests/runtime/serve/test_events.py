"""Event streams: phases, steps, one preview per segment, and the final state of a job."""

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

from scail2_rt.runtime.serve.wire import Wire
from tests.support.served import LONG, Served, serving, wait_for

pytest_plugins = ["tests.support.runtime_fixtures"]


def test_a_job_from_its_queue_to_its_end(served: Served, body: dict[str, Any]) -> None:
    first = served.post({**body, "steps": "30", "segment_length": "9"})
    second = served.post(body)
    told = list(Wire(served.url, None).events(f"/v1/videos/{second['id']}/events"))
    assert (told[0][0], told[0][1]["status"], told[0][1]["queue_position"]) == ("progress", "queued", 1)
    kinds = [kind for kind, _ in told]
    assert kinds[-1] == "completed"
    assert set(kinds) <= {"progress", "preview", "completed"}
    assert told[-1][1] == served.video(second["id"])
    phases = [video["phase"] for kind, video in told if kind == "progress" and video.get("phase")]
    assert phases.index("reference") < phases.index("denoise") < phases.index("decode")
    states = [video["status"] for kind, video in told if kind != "preview"]
    assert states == sorted(states, key=["queued", "in_progress", "completed"].index)
    assert all(
        video["status"] == ("in_progress" if video["phase"] in ("denoise", "decode", "finish") else video["status"])
        for kind, video in told
        if kind == "progress" and video.get("phase")
    )
    fractions = [video["progress"] for kind, video in told if kind != "preview"]
    assert fractions == sorted(fractions)
    served.done(first["id"])


def test_previews_show_each_finished_segment(served: Served, body: dict[str, Any]) -> None:
    video = served.post({**body, "segment_length": "9", "steps": "20"})
    told = list(Wire(served.url, None).events(f"/v1/videos/{video['id']}/events"))
    shown = [document for kind, document in told if kind == "preview"]
    assert shown
    assert [picture["segment"] for picture in shown] == sorted({picture["segment"] for picture in shown})
    for picture in shown:
        image = Image.open(io.BytesIO(base64.b64decode(picture["jpeg"])))
        assert (image.format, image.size) == ("JPEG", (96, 64))


def test_streams_end_with_their_job_and_leave_nothing(served: Served, body: dict[str, Any]) -> None:
    video = served.post({**body, **LONG})
    stream = Wire(served.url, None).events(f"/v1/videos/{video['id']}/events")
    assert next(stream)[0] == "progress"
    served.ask("DELETE", f"/v1/videos/{video['id']}")
    assert [kind for kind, _ in stream][-1] == "deleted"
    assert served.ask("GET", f"/v1/videos/{video['id']}/events").status == 404


def test_what_a_killed_server_leaves_is_tidied_up_and_results_expire(
    engines: Path, case: Path, cache: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    with serving(engines, data, cache, "--keep", "1h") as own:
        kept = own.done(own.post(own.case(case))["id"])
        assert kept["expires_at"] == kept["completed_at"] + 3600
        own.kill()
        (data / "incoming" / "half").write_bytes(b"x")
        (data / "jobs" / "video_unknown").mkdir()
        (data / "files" / "file-unknown").write_bytes(b"x")
        own._words += ["--keep", "1s"]
        own.start()
        wait_for(lambda: own.ask("GET", f"/v1/videos/{kept['id']}").status == 404)
        # The record is deleted before the folder, so that no client gets a file that is about to be deleted.
        wait_for(lambda: [list((data / name).iterdir()) for name in ("incoming", "jobs")] == [[], []])
        assert len(list((data / "files").iterdir())) == 4
