"""Long tests (`make soak`): kills at random times on a cluster, a replica that is paused and continued, and a new
cluster with the data of an old one. `SCAIL2_SOAK_RAY_KILLS` shortens them."""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'scail2-rt[ray]'")

from tests.support.command import command_environment
from tests.support.ray_cluster import (
    FRONT_END,
    LEDGER,
    REPLICA,
    Deployed,
    add_node,
    after_first_segment,
    nodes,
    processes,
    working_on,
)
from tests.support.served import SMALL, alive, wait_for

pytest_plugins = ["tests.support.runtime_fixtures"]
pytestmark = pytest.mark.soak
KILLS = int(os.environ.get("SCAIL2_SOAK_RAY_KILLS", "200"))


def kill(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def test_kills_at_random_moments(engines: Path, case: Path, cache: Path, tmp_path: Path) -> None:
    """Kill replicas, nodes, the front end and the ledger: every job completes once, with the same result as without
    kills."""
    jobs, seeds, rng = max(2, KILLS // 2), 4, random.Random(11)
    with nodes(2, command_environment(cache)) as cluster:
        own = Deployed(str(tmp_path / "data"), cache, cluster.address).deploy(engines)
        body: dict[str, Any] = own.case(case, **{**SMALL, "segment_length": "9", "steps": "40"})
        plain = [own.post({**body, "seed": seed})["id"] for seed in range(seeds)]
        for video_id in plain:
            own.done(video_id)
        expected = [own.content(video_id) for video_id in plain]
        made = {own.post({**body, "seed": number % seeds})["id"]: number % seeds for number in range(jobs)}
        kills = dict.fromkeys(("replica", "node", "front end", "ledger"), 0)
        while sum(kills.values()) < KILLS:
            time.sleep(rng.uniform(0.0, 4.0))
            if not any(own.record(video_id)["state"] in ("queued", "running") for video_id in made):
                video_id = own.post({**body, "seed": len(made) % seeds})["id"]
                made[video_id] = len(made) % seeds
            what = rng.choices(list(kills), (12, 1, 3, 4))[0]
            if what == "node":
                cluster.remove_node(rng.choice(list(cluster.worker_nodes)), allow_graceful=False)
                add_node(cluster)
            else:
                title = {"replica": REPLICA, "front end": FRONT_END, "ledger": LEDGER}[what]
                found = processes(title)
                if not found:
                    continue
                kill([rng.choice(found)])
            kills[what] += 1
        for video_id, seed in made.items():
            own.done(video_id, timeout_s=1800)
            assert own.content(video_id) == expected[seed], video_id
            attempts = [path for path in Path(own.store, "jobs", video_id).iterdir() if (path / "video.mp4").exists()]
            assert [path.name for path in attempts] == [str(own.record(video_id)["attempt"])]
        print(f"{kills}: {len(made)} jobs, each done once and whole")


def test_a_replica_that_comes_back_changes_nothing(engines: Path, case: Path, cache: Path, tmp_path: Path) -> None:
    with nodes(2, command_environment(cache)) as cluster:
        own = Deployed(str(tmp_path / "data"), cache, cluster.address).deploy(engines)
        body = own.case(case)
        video_id = after_first_segment(own, body, "300")
        stopped = working_on(video_id)
        assert stopped is not None
        os.kill(stopped, signal.SIGSTOP)
        wait_for(lambda: own.record(video_id)["attempt"] == 2, 60)
        own.done(video_id)
        video, record = own.content(video_id), own.record(video_id)
        if alive(stopped):  # Ray Serve may have replaced it meanwhile
            os.kill(stopped, signal.SIGCONT)
            wait_for(lambda: not alive(stopped) or working_on(video_id) is None, 60)
        assert own.record(video_id) == record
        kept = Path(own.store, "jobs", video_id)
        wait_for(lambda: not any((kept / "1").glob("video.mp4")))
        assert (kept / "2" / "video.mp4").read_bytes() == video


def test_a_new_cluster_goes_on(engines: Path, case: Path, cache: Path, tmp_path: Path) -> None:
    """The head is lost without fault tolerance: the cluster ends, and the same command starts the service again."""
    data = str(tmp_path / "data")
    with nodes(1, command_environment(cache)) as cluster:
        own = Deployed(data, cache, cluster.address).deploy(engines)
        body = own.case(case)
        video_id = after_first_segment(own, body, "300")
        waiting = own.post(body)["id"]
    with nodes(1, command_environment(cache)) as cluster:
        own = Deployed(data, cache, cluster.address).deploy(engines)
        for made in (video_id, waiting):
            own.done(made)
        assert json.loads(own.content(video_id, "report"))["resumed_after_segments"] == 1
        assert own.post(body)["id"]  # uploads still exist


def test_a_prompt_goes_where_it_was_before(engines: Path, case: Path, cache: Path, tmp_path: Path) -> None:
    with nodes(2, command_environment(cache)) as cluster:
        own = Deployed(str(tmp_path / "data"), cache, cluster.address).deploy(engines)
        body = own.case(case)
        while len(processes(REPLICA)) < 2:  # jobs that wait start the second replica
            made = [own.post({**body, "steps": "100"})["id"] for _ in range(6)]
            for video_id in made:
                own.done(video_id)
        places: dict[str, set[str]] = {"a": set(), "b": set(), "c": set(), "d": set()}
        for prompt in "abcd" * 4:
            video_id = own.post({**body, "prompt": prompt})["id"]
            own.done(video_id)
            places[prompt].add(json.loads(own.record(video_id)["result"])["replica"])
        print(places)
        assert all(len(found) == 1 for found in places.values())
