"""Uploaded files: used by OpenAI's client, quotas, and jobs that survive the deletion of their files."""

import hashlib
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.served import LONG, Served, serving

pytest_plugins = ["tests.support.runtime_fixtures"]


def test_create_list_retrieve_content_delete(served: Served, case: Path) -> None:
    client, data = served.client(), (case / "rendered_v2.mp4").read_bytes()
    file = client.files.create(file=("../../etc/pass\u202ewd", data), purpose="user_data")
    assert (file.bytes, file.filename, file.status) == (len(data), "passwd", "processed")
    assert client.files.retrieve(file.id).id == file.id
    assert client.files.content(file.id).read() == data
    assert next(iter(client.files.list(limit=1))).id == file.id
    digest = hashlib.sha256(data).hexdigest()
    assert served.ask("GET", f"/v1/files?sha256={digest}").json["data"][0]["id"] == file.id
    assert served.ask("GET", f"/v1/files?sha256={'0' * 64}").json["data"] == []
    assert client.files.delete(file.id).deleted
    for method in (client.files.retrieve, client.files.delete, client.files.content):
        with pytest.raises(openai.NotFoundError):
            method(file.id)
    assert not (served.data / "files" / file.id).exists()


def test_deleting_a_file_does_not_break_a_waiting_job(served: Served, case: Path) -> None:
    first = served.post(served.case(case, **LONG))
    body = served.case(case)
    second = served.post(body)
    for name in ("input_reference", "mask_reference", "video_reference", "video_mask_reference"):
        assert served.ask("DELETE", f"/v1/files/{body[name]['file_id']}").status == 200
    assert served.video(second["id"])["status"] == "queued"
    served.ask("DELETE", f"/v1/videos/{first['id']}")
    served.done(second["id"])


def test_a_file_is_missing_or_twice(served: Served) -> None:
    kind = "multipart/form-data; boundary=b"
    assert served.ask("POST", "/v1/files", b"--b--\r\n", Content_Type=kind).status == 400
    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\nx\r\n'
    assert served.ask("POST", "/v1/files", part + part + b"--b--\r\n", Content_Type=kind).status == 400
    assert not list((served.data / "incoming").iterdir())


def test_quotas_and_sizes(engines: Path, cache: Path, tmp_path: Path, case: Path) -> None:
    options = ("--file-quota", "1MiB", "--max-upload", "1MiB", "--max-frames", "20", "--max-queue-per-key", "1")
    with serving(engines, tmp_path / "data", cache, *options, measured=True) as own:
        client = own.client()
        client.files.create(file=("a", b"x" * 700_000), purpose="vision")
        with pytest.raises(openai.APIStatusError, match="Your files would take more than 1 MiB") as told:
            client.files.create(file=("b", b"x" * 700_000), purpose="vision")
        assert told.value.status_code == 413
        with pytest.raises(openai.APIStatusError, match="exceeds the limit of 1 MiB"):
            client.files.create(file=("b", b"x" * 1_100_000), purpose="vision")
        assert not list((own.data / "incoming").iterdir())
        assert len(list((own.data / "files").iterdir())) == 1
        body: dict[str, Any] = own.case(case)
        answer = own.ask("POST", "/v1/videos", body)
        assert (answer.status, answer.error) == (
            422,
            "The video would have 21 frames; this service makes up to 20. Ask for fewer frames.",
        )
        first = own.post({**body, **LONG, "frames": 20})
        full = own.ask("POST", "/v1/videos", {**body, "frames": 9})
        assert (full.status, full.headers["retry-after"]) == (429, "30")
        own.ask("DELETE", f"/v1/videos/{first['id']}")
        assert not list((own.data / "incoming").iterdir())
