"""The store and the service around it, without processes: fencing, order, expiry."""

import asyncio
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from scail2_rt.engines.registry import backend
from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.serve.errors import Refusal
from scail2_rt.runtime.serve.fields import nested, read_fields
from scail2_rt.runtime.serve.launch import workers_of
from scail2_rt.runtime.serve.server import _greet
from scail2_rt.runtime.serve.service import Service
from scail2_rt.runtime.serve.settings import Settings
from scail2_rt.runtime.serve.store import Store, new_id


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path)
    yield store
    store.close()


def added(store: Store, owner: str = "a", size: int = 0) -> str:
    job_id = new_id("video_")
    store.folder(job_id).mkdir()
    (store.folder(job_id) / "video.mp4").write_bytes(bytes(size))
    return store.add_job(job_id, owner, {"options": {}}, None, "d").id


def test_only_the_present_attempt_ends_a_job(store: Store) -> None:
    job = added(store)
    first = store.take()
    assert first is not None
    assert (first.id, first.attempt, store.take()) == (job, 1, None)
    assert store.give_back(job, 1, True, 0) is not None
    second = store.take()
    assert second is not None
    assert (second.attempt, second.kills) == (2, 1)
    assert not store.finish(job, 1, "completed", {})
    assert store.give_back(job, 1, True, 0) is None
    assert store.finish(job, 2, "completed", {"frames": 1})
    assert not store.finish(job, 2, "completed", {"frames": 2})
    found = store.job(job)
    assert found is not None
    assert (found.state, found.result) == ("completed", {"frames": 1})
    assert store.recover() == 0


def test_kills_are_counted_until_a_segment_is_finished(store: Store) -> None:
    job = added(store)
    counted = []
    for segments in (0, 0, 1, 1):
        row = store.take()
        assert row is not None
        back = store.give_back(job, row.attempt, True, segments)
        assert back is not None
        counted.append(back.kills)
    assert counted == [1, 2, 1, 2]


def test_many_at_once_take_each_job_once_in_order(store: Store) -> None:
    made = [added(store) for _ in range(100)]
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: store.take(), range(120)))
    assert sorted(row.seq for row in taken if row) == list(range(1, 101))
    assert {row.id for row in taken if row} == set(made)
    assert store.recover() == 100
    again = store.take()
    assert again is not None
    assert again.id == made[0]


def test_a_deleted_job_is_nobodys(store: Store) -> None:
    job = added(store)
    row = store.take()
    assert row is not None
    assert store.delete_job(job) == "running"
    assert store.delete_job(job) is None
    assert not store.finish(job, 1, "completed", {})
    assert store.job(job) is None
    assert store.list_jobs("a", None, 10, "desc") == []
    store.forget_job(job)
    assert store.job_ids() == set()


def test_the_oldest_results_make_room(tmp_path: Path) -> None:
    store = Store(tmp_path)
    service = Service(Settings(tmp_path, tmp_path, disk_bytes=3 << 20, keep_s=1000), store)
    made = []
    for _ in range(4):
        made.append(added(store, size=1 << 20))
        row = store.take()
        assert row is not None
        store.finish(row.id, row.attempt, "completed", {})
    waiting = added(store, size=1 << 20)
    service.sweep()
    left = [row.id for row in store.list_jobs("a", None, 10, "asc")]
    assert left == [made[-1], waiting]
    assert service.used_bytes() <= 3 << 20
    service._check_queue("a")
    (store.files / "large").write_bytes(bytes(3 << 20))
    service.sweep()
    assert [row.id for row in store.list_jobs("a", None, 10, "asc")] == [waiting]
    with pytest.raises(Refusal, match="folder is full"):
        service._check_queue("a")
    (store.files / "large").unlink()
    store._write("UPDATE jobs SET completed_at=?", time.time() - 1001)
    service.sweep()
    assert [row.id for row in store.list_jobs("a", None, 10, "asc")] == [waiting]
    store.close()


def test_brackets_and_types() -> None:
    assert nested([("a[b][c]", "1"), ("a[d]", "2"), ("e[]", "3"), ("e[]", "4"), ("f", "5")]) == {
        "a": {"b": {"c": "1"}, "d": "2"},
        "e": {"0": "3", "1": "4"},
        "f": "5",
    }
    for pairs in ([("a", 1), ("a", 2)], [("a[", 1)], [("[a]", 1)], [("a", 1), ("a[b]", 2)]):
        with pytest.raises(Refusal):
            nested(pairs)
    asked = read_fields(
        [
            *(("steps", " 12 "), ("guidance", "2.5"), ("fit_reference", "True"), ("size", "96x64"), ("seconds", "1.5")),
            *(("video_reference[file_id]", "file-1"), ("input_reference[image_url]", "data:,x"), ("model", None)),
            *(
                ("extra_refs[0][0][file_id]", "f1"),
                ("extra_refs[0][1][file_id]", "f2"),
                ("mask_reference", '{"url":"u"}'),
            ),
            *(("frames", None), ("extra_body[seed]", "7"), ("user", "me")),
        ]
    )
    assert asked.options == {
        "steps": 12,
        "guidance": 2.5,
        "fit_reference": True,
        "size": (64, 96),
        "seed": 7,
    }
    assert asked.references == {
        "driving": {"file_id": "file-1"},
        "image": {"url": "data:,x"},
        "mask_image": {"url": "u"},
    }
    assert asked.extra_refs == (({"file_id": "f1"}, {"file_id": "f2"}),)
    assert (asked.seconds, asked.model) == (1.5, None)


def test_gpus_make_workers() -> None:
    assert [workers_of("all", 1, 0), workers_of("all", 1, 4), workers_of("all", 2, 4), workers_of("2", 1, 4)] == [
        1,
        4,
        2,
        2,
    ]
    for wanted, each, there in (("2", 1, 0), ("all", 2, 0), ("8", 1, 4), ("3", 2, 4), ("0", 1, 4), ("x", 1, 4)):
        with pytest.raises(InputError):
            workers_of(wanted, each, there)


def test_each_worker_sees_its_own_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)

    def seen(**changes: Any) -> list[str | None]:
        pool = Service(Settings(tmp_path, tmp_path, **changes), store).pool
        environments = [pool._environment(worker) for worker in pool.workers]
        return [None if each is None else each["CUDA_VISIBLE_DEVICES"] for each in environments]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert seen() == [None]
    assert seen(workers=2, on_gpu=True) == ["0", "1"]
    assert seen(workers=2, gpus_per_video=2, on_gpu=True) == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-a,6")
    assert seen(workers=3, on_gpu=True) == ["4", "GPU-a", "6"]
    store.close()


def test_the_licence_of_tensorrt_rtx_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path)
    settings = Settings(tmp_path, tmp_path)
    service = Service(settings, store)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for name in ("tensorrt-rtx", "torch"):
            service.pool.workers[0].about = {"choice": name, "hosting": backend(name).hosting}
            _greet(settings, service, listener)
        port = listener.getsockname()[1]
    said = capsys.readouterr()
    assert said.out == f"http://127.0.0.1:{port}\n" * 2
    assert said.err.count("may not be used to host a service for third parties") == 1
    store.close()


def test_a_listener_that_leaves_while_a_job_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The live record belongs to the job, not to the event stream. Regression test: closing a stream once stopped the
    worker's messages."""
    store = Store(tmp_path)
    service = Service(Settings(tmp_path, tmp_path), store)
    job_id, finish = added(store), store.finish
    row = store.take()
    assert row is not None

    def left(*arguments: Any) -> bool:
        service.live.pop(job_id, None)
        return finish(*arguments)

    monkeypatch.setattr(store, "finish", left)
    done = {"done": {"frames": 1, "timings_s": {}, "inference_s": 1.0}}
    asyncio.run(service._heard(row, {"event": {"phase": "text", "step": 0}}))
    asyncio.run(service._heard(row, done))
    found = store.job(job_id)
    assert found is not None
    assert found.state == "completed"
    assert service.live == {}
    store.close()
