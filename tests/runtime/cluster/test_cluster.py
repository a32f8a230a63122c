"""A batch and the service on a real cluster on this machine, and recovery after kills."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from scail2_rt.runtime.media.unfinished import resumable
from tests.support.command import SCAIL2_RT, SMALL, Run, command_environment, one_json
from tests.support.served import SMALL as SMALL_FIELDS
from tests.support.served import alive, wait_for

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

    from tests.support.ray_cluster import Deployed

pytest_plugins = ["tests.support.runtime_fixtures"]
pytestmark = pytest.mark.slow
STEPS = "150"  # of a segment that something happens in


@pytest.fixture(scope="module")
def alone(scail2: Run, engines: Path, case: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Videos of one machine, by the number of their steps."""
    made = {}
    for steps in ("2", STEPS):
        output = tmp_path_factory.mktemp("alone") / "out.mp4"
        words = ["generate", engines, "--case", case, "-o", output, *SMALL, "--steps", steps, "--prompt", "a man walks"]
        result = scail2(*words, "--no-metadata")  # as the service does
        assert result.returncode == 0, result.stderr
        made[steps] = output.read_bytes()
    return made


def test_a_batch_is_what_one_machine_makes(
    cluster: "Cluster", installed: Run, alone: dict[str, bytes], engines: Path, case: Path, tmp_path: Path
) -> None:
    options = {"case": str(case), "prompt": "a man walks", "steps": 2}
    lines = [f"a man walks@@{case}", json.dumps(options), f"x@@{tmp_path / 'none'}"]
    (tmp_path / "b.txt").write_text("\n".join(lines) + "\n")
    words = [
        "generate",
        engines,
        "--batch",
        tmp_path / "b.txt",
        "-o",
        tmp_path / "out",
        *SMALL,
        "--json",
        "--no-metadata",
    ]
    first = installed(*words, "--ray", cluster.address)
    assert first.returncode == 1
    report = one_json(first)
    assert [entry["status"] for entry in report["cases"]] == ["complete", "complete", "failed"]
    assert "does not exist" in report["cases"][2]["error"]
    for name in (f"{case.name}.mp4", f"{case.name}-2.mp4"):
        assert (tmp_path / "out" / name).read_bytes() == alone["2"]
    (tmp_path / "out" / f"{case.name}-2.mp4").unlink()
    again = one_json(installed(*words, "--ray", cluster.address, "--resume"))
    assert [entry["timings_s"] for entry in again["cases"][:1]] == [report["cases"][0]["timings_s"]]  # not made again
    assert (tmp_path / "out" / f"{case.name}-2.mp4").read_bytes() == alone["2"]


def test_a_case_of_a_batch_goes_on_when_its_process_is_killed(
    cluster: "Cluster", alone: dict[str, bytes], engines: Path, case: Path, cache: Path, tmp_path: Path
) -> None:
    from tests.support.ray_cluster import processes

    (tmp_path / "b.txt").write_text(f"a man walks@@{case}\n")
    words = ["generate", engines, "--batch", tmp_path / "b.txt", "-o", tmp_path, *SMALL, "--steps", STEPS, "--json"]
    words.append("--no-metadata")
    run = subprocess.Popen(
        [SCAIL2_RT, *map(str, words), "--ray", cluster.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=command_environment(cache),
    )
    output = tmp_path / f"{case.name}.mp4"
    wait_for(lambda: resumable(output) == 1, 60)
    for pid in processes("ray::Runner"):
        os.kill(pid, signal.SIGKILL)
    said, log = run.communicate(timeout=120)
    assert run.returncode == 0, log
    assert "another one resumes it" in log
    assert json.loads(said)["cases"][0]["resumed_after_segments"] == 1
    assert output.read_bytes() == alone[STEPS]


@pytest.fixture(scope="module")
def body(deployed: "Deployed", case: Path) -> dict[str, Any]:
    return deployed.case(case)


def resumed(deployed: "Deployed", video_id: str) -> int:
    return int(json.loads(deployed.content(video_id, "report"))["resumed_after_segments"])


def test_a_video_through_openais_client(
    deployed: "Deployed", body: dict[str, Any], alone: dict[str, bytes], case: Path
) -> None:
    client = deployed.client()
    fields = {name: value for name, value in body.items() if name != "prompt"}
    made = client.videos.create(prompt=body["prompt"], extra_body=fields)
    assert made.status == "queued"
    deployed.done(made.id)
    assert client.videos.download_content(made.id).read() == alone["2"]
    assert deployed.content(made.id, "thumbnail")[8:12] == b"WEBP"
    assert deployed.content(made.id, "input_reference") == (case / "ref.png").read_bytes()
    assert [video.id for video in client.videos.list()] == [made.id]
    kept = Path(deployed.store, "jobs", made.id, "1")
    assert sorted(path.name for path in kept.iterdir()) == ["video.json", "video.mp4"]
    again = deployed.post(body, Idempotency_Key="k")
    assert deployed.post(body, Idempotency_Key="k")["id"] == again["id"]
    assert deployed.ask("POST", "/v1/videos", {**body, "steps": "x"}).status == 400
    for video_id in (again["id"], made.id):
        deployed.done(video_id)
        assert deployed.ask("DELETE", f"/v1/videos/{video_id}").status == 200
        assert deployed.ask("GET", f"/v1/videos/{video_id}").status == 404
    wait_for(lambda: not kept.exists())


def test_progress_comes_through_events(deployed: "Deployed", body: dict[str, Any]) -> None:
    video_id = deployed.post({**body, "steps": "40"})["id"]
    told = deployed.ask("GET", f"/v1/videos/{video_id}/events").body.decode()
    kinds = [line.removeprefix("event: ") for line in told.splitlines() if line.startswith("event: ")]
    assert kinds[-1] == "completed"
    assert "preview" in kinds
    assert '"phase": "denoise"' in told


def test_a_job_goes_on_when_its_replica_is_killed(
    deployed: "Deployed", body: dict[str, Any], alone: dict[str, bytes]
) -> None:
    from tests.support.ray_cluster import after_first_segment, working_on

    video_id = after_first_segment(deployed, body, STEPS)
    replica = working_on(video_id)
    assert replica is not None
    os.kill(replica, signal.SIGKILL)
    deployed.done(video_id)
    assert resumed(deployed, video_id) == 1
    assert deployed.content(video_id) == alone[STEPS]
    assert deployed.record(video_id)["attempt"] == 2


def test_nothing_is_lost_when_front_end_and_ledger_are_killed(
    deployed: "Deployed", body: dict[str, Any], alone: dict[str, bytes]
) -> None:
    from tests.support.ray_cluster import FRONT_END, LEDGER, after_first_segment, processes

    video_id = after_first_segment(deployed, body, STEPS)
    waiting = deployed.post(body)["id"]
    killed = [*processes(FRONT_END), *processes(LEDGER)]
    assert len(killed) == 2
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not any(alive(pid) for pid in killed))
    for made, steps in ((video_id, STEPS), (waiting, "2")):
        deployed.done(made)
        assert deployed.content(made) == alone[steps]
        assert deployed.record(made)["attempt"] == 1  # its replica was not disturbed


def test_more_gpus_keep_the_running_replica(
    deployed: "Deployed", body: dict[str, Any], engines: Path, case: Path
) -> None:
    from scail2_rt.benchmarks.speed.ray_cluster import throughput
    from tests.support.ray_cluster import working_on

    def started() -> tuple[str, int]:
        video_id = deployed.post({**body, "steps": "1000", "guidance": "3"})["id"]
        wait_for(lambda: working_on(video_id) is not None, 60)
        return video_id, working_on(video_id) or 0

    first, kept = started()
    deployed.deploy(engines, "--gpus", "2")
    second, added = started()  # a waiting job starts the second replica
    assert added != kept
    assert deployed.record(first)["attempt"] == 1
    assert deployed.ask("DELETE", f"/v1/videos/{first}").status == 200
    third, place = started()
    assert place == kept  # its session is still warm
    for video_id in (second, third):
        assert deployed.ask("DELETE", f"/v1/videos/{video_id}").status == 200
    measured = throughput(deployed.url, deployed.store, case, SMALL_FIELDS, videos=4, replicas=2)
    assert sorted(int(replica.split("/")[1]) for replica in measured["warm_up"]["by_replica"]) == sorted((kept, added))
    assert measured["by_replica"].total() == 4


def test_new_engines_come_while_jobs_of_the_old_ones_end(
    deployed: "Deployed", body: dict[str, Any], alone: dict[str, bytes], engines: Path, tmp_path: Path
) -> None:
    from tests.support.ray_cluster import REPLICA, after_first_segment, processes

    other = tmp_path / "other"
    shutil.copytree(engines, other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest))  # the same engines under another digest
    before = deployed.record(after_first_segment(deployed, body, STEPS))
    old = processes(REPLICA)
    deployed.deploy(other)
    after = deployed.record(deployed.post(body)["id"])
    assert json.loads(before["request"])["engines"] != json.loads(after["request"])["engines"]
    for record, steps in ((before, STEPS), (after, "2")):
        deployed.done(record["id"])
        assert deployed.content(record["id"]) == alone[steps]
        assert deployed.record(record["id"])["attempt"] == 1
    wait_for(lambda: not any(alive(pid) for pid in old), 60)


def test_a_job_goes_on_when_its_node_is_killed(
    cluster: "Cluster", deployed: "Deployed", body: dict[str, Any], alone: dict[str, bytes]
) -> None:
    from tests.support.ray_cluster import after_first_segment, node_of, working_on

    video_id = after_first_segment(deployed, body, STEPS)
    replica = working_on(video_id)
    assert replica is not None
    cluster.remove_node(node_of(cluster, replica), allow_graceful=False)
    began = time.monotonic()
    wait_for(lambda: deployed.record(video_id)["attempt"] == 2, 60)
    print(f"on another node after {time.monotonic() - began:.1f} s")
    deployed.done(video_id)
    assert resumed(deployed, video_id) == 1
    assert deployed.content(video_id) == alone[STEPS]
