"""The ledger without a cluster, as a plain object with a folder and with S3: claims, attempts, restarts."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.cluster import ledger as ledgers
from scail2_rt.runtime.cluster.engines_folder import digest_at, digest_of, local_engines
from scail2_rt.runtime.cluster.ledger import Ledger, newest_state
from scail2_rt.runtime.cluster.objects import Objects

REQUEST = {"engines": "e1", "encodings": "p", "options": {}, "facts": {}}
DONE = {"done": {"frames": 1}}


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "x")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        import s3fs

        s3fs.S3FileSystem().mkdir("bucket")
        yield "s3://bucket/service"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path)
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


def record(place: str, job_id: str) -> dict[str, Any]:
    data = Objects(place).get(f"records/{job_id}.json")
    assert data is not None
    return dict(json.loads(data))


async def add(ledger: Ledger, *names: str) -> None:
    for name in names:
        await ledger.ask("add_job", name, "local", REQUEST, None, "d")


def test_objects_are_written_listed_fetched_and_removed(place: str, tmp_path: Path) -> None:
    objects = Objects(place)
    assert objects.get("a/b") is None
    assert objects.names("a") == []
    objects.put("a/b", b"1")
    objects.put_json("a/c.json", {"x": 1})
    (tmp_path / "file").write_bytes(b"2")
    objects.put_file(tmp_path / "file", "a/d/e")
    assert objects.names("a") == ["b", "c.json", "d/e"]
    assert list(objects.documents("a")) == [{"x": 1}]
    assert objects.fetch("a/d/e", tmp_path / "new" / "file")
    assert (tmp_path / "new" / "file").read_bytes() == b"2"
    assert not objects.fetch("a/none", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    objects.remove("a/d")
    objects.remove("a/d")
    assert objects.names("a") == ["b", "c.json"]


def test_an_attempt_that_was_replaced_cannot_end_the_job(place: str) -> None:
    async def story() -> None:
        ledger = Ledger(place)
        await add(ledger, "video_a")
        assert await ledger.claim("video_a", "other engines") is None
        first = await ledger.claim("video_a", "e1")
        assert first is not None
        assert await ledger.claim("video_a", "e1") is None
        assert record(place, "video_a")["state"] == "running"
        for _ in range(ledgers.SILENT_TICKS):
            await ledger._tick()
        assert await ledger.heard("video_a", first.attempt, {})  # just in time
        for _ in range(ledgers.SILENT_TICKS + 1):
            await ledger._tick()
        second = await ledger.claim("video_a", "e1")
        assert second is not None
        assert second.attempt == first.attempt + 1
        assert not await ledger.heard("video_a", first.attempt, {"done": {"frames": 99}})
        assert await ledger.heard("video_a", second.attempt, DONE)
        assert await ledger.heard("video_a", second.attempt, DONE)  # repeated, because the answer was lost
        assert not await ledger.heard("video_a", first.attempt, {"done": {"frames": 99}})
        assert json.loads(record(place, "video_a")["result"]) == {"frames": 1}

    asyncio.run(story())


def test_a_new_ledger_knows_what_the_old_one_answered(place: str) -> None:
    async def story() -> None:
        old = Ledger(place)
        await add(old, "video_a", "video_b", "video_c", "video_d")
        await old.ask("add_file", "file-1", "local", "n", 1, "h", "p")
        running, done = await old.claim("video_a", "e1"), await old.claim("video_b", "e1")
        assert running is not None
        assert done is not None
        await old.heard("video_b", done.attempt, DONE)
        await old.ask("delete_job", "video_d")
        new = Ledger(place)
        states = {name: (await new.ask("job", name)) for name in ("video_a", "video_b", "video_c", "video_d")}
        assert [row and row.state for row in states.values()] == ["running", "completed", "queued", None]
        assert (await new.ask("file", "file-1", "local")).sha256 == "h"
        assert await new.heard("video_a", running.attempt, {})  # its replica has not stopped
        await add(new, "video_e")
        assert (await new.ask("job", "video_e")).seq > states["video_c"].seq
        await new._tick()
        assert Objects(place).get("records/video_d.json") is None

    asyncio.run(story())


def test_an_older_ledger_ends_before_it_answers(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended(BaseException):
        pass

    def end(code: int) -> None:
        raise Ended

    async def story() -> None:
        old = Ledger(place)
        await add(old, "video_a")
        new = Ledger(place)
        monkeypatch.setattr(ledgers.os, "_exit", end)
        with pytest.raises(Ended):
            await old.claim("video_a", "e1")
        assert await new.claim("video_a", "e1") is not None

    asyncio.run(story())


def test_a_job_whose_replicas_keep_dying_fails(place: str) -> None:
    async def story() -> None:
        ledger = Ledger(place)
        await add(ledger, "video_a")
        for _ in range(ledgers.KILLS):
            assert await ledger.claim("video_a", "e1") is not None
            await ledger._lost("video_a")
        row = await ledger.ask("job", "video_a")
        assert row.state == "failed"
        assert row.result["kind"] == "crash"

    asyncio.run(story())


def test_replaced_engines_go_when_no_job_is_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import serve

    gone: list[str] = []
    monkeypatch.setattr(serve, "delete", lambda name, _blocking: gone.append(name))
    monkeypatch.setattr(Ledger, "_push_more", lambda self: None)

    async def story() -> None:
        ledger = Ledger(str(tmp_path))
        await add(ledger, "video_a")
        await ledger.offer("e1", "scail2-rt-e1")
        await ledger.offer("e0", "engines-of-a-config-file")
        ledger.objects.put("current", b"e2")
        await ledger._tick()
        row = await ledger.claim("video_a", "e1")
        assert row is not None
        await ledger._tick()
        assert gone == []
        await ledger.heard("video_a", row.attempt, DONE)
        await ledger._tick()
        assert gone == ["scail2-rt-e1"]
        assert list(Ledger(str(tmp_path))._apps) == ["e0"]

    asyncio.run(story())


def test_work_goes_on_from_the_state_with_most_segments(place: str) -> None:
    objects = Objects(place)
    assert newest_state(objects, "video_a") is None
    for name in ("inputs/plan", "1/state-9.safetensors", "2/state-10.safetensors", "3/partial-11.mp4", "3/video.mp4"):
        objects.put(f"jobs/video_a/{name}", b"")
    assert newest_state(objects, "video_a") == (2, 10)


def test_engines_are_brought_to_a_node_once_and_told_by_their_manifest(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCAIL2_RT_CACHE", str(tmp_path / "cache"))
    url = place if "://" in place else f"file://{place}/there"
    objects = Objects(url)
    objects.put("weights/a", b"1")
    objects.put("manifest.json", b"{}")
    digest = digest_at(url)
    folder = local_engines(url, digest)
    assert digest_of(folder) == digest
    assert (folder / "weights" / "a").read_bytes() == b"1"
    objects.remove("weights/a")
    assert local_engines(url, digest) == folder
    (folder / "manifest.json").write_text("{ }")
    with pytest.raises(InputError, match="on this node has other engines"):
        local_engines(str(folder), digest)
