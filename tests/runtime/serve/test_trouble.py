"""Regression tests for problems found by using the service manually."""

import asyncio
import http.client
import json
import shutil
import sqlite3
import urllib.parse
from pathlib import Path
from typing import Any

import pytest

from scail2_rt.runtime.serve import pool
from scail2_rt.runtime.serve.errors import DiskFull, Refusal
from scail2_rt.runtime.serve.fields import read_fields
from scail2_rt.runtime.serve.pool import Pool
from scail2_rt.runtime.serve.service import Service
from scail2_rt.runtime.serve.settings import Settings
from scail2_rt.runtime.serve.store import Store, new_id
from tests.support.command import Run
from tests.support.served import Served, serving

pytest_plugins = ["tests.support.runtime_fixtures"]


class Full:
    """A connection whose disk is full while the file `block` exists."""

    def __init__(self, connection: sqlite3.Connection, block: Path) -> None:
        self._connection, self._block = connection, block

    def execute(self, *words: Any) -> sqlite3.Cursor:
        if self._block.exists():
            raise sqlite3.OperationalError("database or disk is full")
        return self._connection.execute(*words)

    def close(self) -> None:
        self._connection.close()


def queued(store: Store) -> str:
    job = new_id("video_")
    store.folder(job).mkdir()
    store.add_job(job, "a", {"options": {}}, None, "")
    return job


def test_a_full_disk_lets_jobs_be_deleted(tmp_path: Path) -> None:
    store = Store(tmp_path)
    job = queued(store)
    store._writer = Full(store._writer, store.reserve)  # type: ignore[assignment]
    assert store.delete_job(job) == "queued"
    assert store.job(job) is None
    assert not store.reserve.exists()
    store.keep_reserve()
    assert store.reserve.exists()


def test_a_disk_without_any_room_is_said(tmp_path: Path) -> None:
    store = Store(tmp_path)
    job = queued(store)
    (tmp_path / "block").touch()
    store._writer = Full(store._writer, tmp_path / "block")  # type: ignore[assignment]
    with pytest.raises(DiskFull):
        store.delete_job(job)
    assert store.job(job) is not None


def test_what_a_worker_did_waits_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "FULL_DISK_S", 0.0)
    tries = []

    def write(word: str) -> str:
        tries.append(word)
        if len(tries) < 3:
            raise DiskFull("no room")
        return "noted"

    async def hear(row: Any, message: Any) -> None: ...

    workers = Pool(Settings(tmp_path, tmp_path), Store(tmp_path / "data"), hear)
    assert asyncio.run(workers.noted(write, "end")) == "noted"
    assert tries == ["end"] * 3


def test_a_list_goes_on_from_an_entry_that_is_gone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    jobs = [queued(store) for _ in range(5)]
    store.delete_job(jobs[2])
    store.forget_job(jobs[2])
    assert [row.id for row in store.list_jobs("a", jobs[2], 10, "desc")] == [jobs[1], jobs[0]]
    assert [row.id for row in store.list_jobs("a", jobs[2], 10, "asc")] == [jobs[3], jobs[4]]
    for owner, entry in (("b", jobs[2]), ("b", jobs[1]), ("a", "video_of_nobody")):
        with pytest.raises(LookupError):
            store.list_jobs(owner, entry, 10, "asc")


def test_places_are_those_of_all_that_wait(tmp_path: Path) -> None:
    store = Store(tmp_path)
    jobs = [queued(store) for _ in range(4)]
    assert store.take() is not None
    rows = store.list_jobs("a", None, 10, "asc")
    assert [store.places().get(row.seq) for row in rows] == [None, 0, 1, 2]
    assert [row.id for row in rows] == jobs


def test_records_name_no_place_of_this_machine(tmp_path: Path) -> None:
    store = Store(tmp_path / "data")
    engines, weights = tmp_path / "our engines", tmp_path / "sam"
    service = Service(Settings(engines, tmp_path / "data", segmenter_weights=weights), store)
    row = store.job(queued(store))
    assert row is not None
    record = tmp_path / "record.json"
    written = {"image": f"{store.folder(row.id)}/input_reference", "engines": str(engines), "by": f"{weights}/model"}
    record.write_text(json.dumps({**written, "prompt": "ü / “x”"}))
    shown = json.loads(service.without_places(row, record))
    assert shown == {"image": "input_reference", "engines": "our engines", "by": "sam/model", "prompt": "ü / “x”"}


def test_points_may_come_one_by_one() -> None:
    asked = read_fields([("points", "image:1,2"), ("points", "3,4"), ("boxes", "1,2,3,4;5,6,7,8")])
    assert asked.masking == {"points": ["image:1,2", "3,4"], "boxes": ["1,2,3,4", "5,6,7,8"]}


def test_a_rate_is_a_short_fraction() -> None:
    for given, read in ((16, "16"), (23.976, "23.976"), (" 30000/1001 ", "30000/1001")):
        assert read_fields([("fps", given)]).options == {"fps": read}
    for wrong in ("1e999999999", "x", True, "", "-3"):
        with pytest.raises(Refusal, match="--fps must be a number such as 16"):
            read_fields([("fps", wrong)])


def test_head_answers_as_get_without_a_body(served: Served) -> None:
    for path in ("/", "/health", "/v1/videos", "/docs"):
        answer = served.ask("HEAD", path)
        assert (answer.status, answer.body) == (200, b""), path
    assert served.ask("HEAD", "/v1/videos/video_none/content").status == 404
    assert int(served.ask("HEAD", "/").headers["content-length"]) == len(served.ask("GET", "/").body)


@pytest.mark.parametrize("text", ['{"input_reference": {"file_id": "\\ud800"}}', '{"prompt": "\\ud800"}', "[" * 99_999])
def test_half_characters_and_depths_are_no_text(served: Served, text: str) -> None:
    answer = served.ask("POST", "/v1/videos", text.encode(), Content_Type="application/json")
    assert answer.status == 400
    assert answer.error.startswith("The body cannot be read (")


@pytest.mark.parametrize("headers", [{"Host": "[::1"}, {"Origin": "http://["}])
def test_headers_that_are_no_address(served: Served, headers: dict[str, str]) -> None:
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(served.url).netloc, timeout=60)
    connection.request("GET", "/v1/videos", headers=headers)
    assert connection.getresponse().status == 403
    connection.close()


def test_a_mask_alone_is_told_that_both_can_be_made(served: Served, body: dict[str, Any]) -> None:
    lone = {name: value for name, value in body.items() if name != "video_mask_reference"}
    assert served.ask("POST", "/v1/videos", lone).error.endswith("If you send no mask at all, the service makes both.")


def test_a_data_folder_that_cannot_be(scail2: Run, engines: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = scail2("serve", engines, "--data", tmp_path / "file" / "data", "--port", "0")
    assert result.returncode == 2
    assert "cannot be created" in result.stderr


def test_a_segmenter_that_is_not_there(scail2: Run, engines: Path, tmp_path: Path) -> None:
    words = ("--segmenter-weights", tmp_path / "none", "--data", tmp_path / "data", "--port", "0")
    result = scail2("serve", engines, *words)
    assert result.returncode == 2
    assert str(tmp_path / "none") in result.stderr
    assert not (tmp_path / "data").exists()


def test_engines_that_are_rebuilt_are_reopened(
    scail2: Run, engines: Path, tiny_checkpoint: Path, case: Path, cache: Path, tmp_path: Path
) -> None:
    own = tmp_path / "engines"
    shutil.copytree(engines, own)
    with serving(own, tmp_path / "data", cache, "--no-warm") as service:
        body = service.case(case, frames=5)
        service.done(service.post(body)["id"])
        words = ("-o", own, "--backend", "torch", "--precision", "bf16", "--rebuild")
        built = scail2("build-engines", tiny_checkpoint, *words)
        assert built.returncode == 0, built.stderr
        again = service.post(body)["id"]
        service.done(again)
        report = json.loads(service.content(again, "report"))
        assert (report["engines"]["directory"], report["engines"]["precision"]) == ("engines", "bf16")
        (own / "manifest.json").unlink()
        failed = service.done(service.post(body)["id"], "failed")
        assert failed["error"]["message"].startswith("The engines of the service were changed")
