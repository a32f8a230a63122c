"""The videos interface with OpenAI's client: a job, its states, its results, and error sentences."""

import base64
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.clips import write_clip
from tests.support.command import SMALL as SMALL_WORDS
from tests.support.command import Run, error_of, read_video
from tests.support.served import INPUTS, SMALL, Served

pytest_plugins = ["tests.support.runtime_fixtures"]
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
PATHS = {"input_reference": "--image", "mask_reference": "--mask-image", "video_reference": "--driving"} | {
    "video_mask_reference": "--mask-video"
}


def test_the_openai_client_works_unchanged(
    served: Served, case: Path, scail2: Run, engines: Path, tmp_path: Path
) -> None:
    """Create and poll, download, list, delete; the video is bit-identical to that of the command line."""
    client = served.client()
    kept = {name: {"file_id": served.upload(case / file)} for name, file in INPUTS.items() if name != "input_reference"}
    with (case / "ref.png").open("rb") as image:
        video = client.videos.create_and_poll(
            prompt="a man walks",
            model="scail-2",
            size="96x64",  # type: ignore[arg-type]
            input_reference=image,
            poll_interval_ms=100,
            extra_body={**kept, "steps": 2, "segment_length": 13, "guidance": 1, "seed": 3, "fit_reference": False},
        )
    assert (video.status, video.progress, video.size, video.error) == ("completed", 100, "96x64", None)
    assert Fraction(video.seconds) == Fraction(21, 16)
    assert video.expires_at is not None
    assert video.completed_at is not None
    assert video.expires_at - video.completed_at in range(7 * 86_400 - 2, 7 * 86_400 + 2)
    result = tmp_path / "served.mp4"
    client.videos.download_content(video.id).write_to_file(result)
    output = tmp_path / "own.mp4"
    words = ("--case", case, "--prompt", "a man walks", *SMALL_WORDS, "--seed", "3")
    assert scail2("generate", engines, *words, "-o", output, "--no-metadata").returncode == 0
    assert result.read_bytes() == output.read_bytes()
    assert read_video(result).audio_s > 0
    for variant in ("thumbnail", "spritesheet"):
        assert client.videos.download_content(video.id, variant=variant).read()[8:12] == b"WEBP"
    report = json.loads(served.content(video.id, "report"))
    assert report["status"] == "complete"
    assert video.id in [entry.id for entry in client.videos.list()]
    assert client.videos.retrieve(video.id).status == "completed"
    assert client.videos.delete(video.id).deleted
    assert video.id not in [entry.id for entry in client.videos.list()]
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)
    assert not (served.data / "jobs" / video.id).exists()


def test_files_fields_and_urls_give_the_same_video(served: Served, case: Path, body: dict[str, Any]) -> None:
    """Multipart with files and strings, JSON with uploaded files, and data: URLs."""
    parts = [(name, (case / file).read_bytes()) for name, file in INPUTS.items()]
    text = [
        (name, value.encode()) for name, value in {**SMALL, "prompt": "a man walks", "fit_reference": "false"}.items()
    ]
    boundary = b"--=_boundary"
    data = b""
    for name, value in parts:
        data += b'--%b\r\nContent-Disposition: form-data; name="%b"; filename="../../x"\r\n\r\n' % (
            boundary,
            name.encode(),
        )
        data += value + b"\r\n"
    for name, value in text:
        data += b'--%b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (boundary, name.encode(), value)
    data += b"--" + boundary + b"--\r\n"
    kind = f"multipart/form-data; boundary={boundary.decode()}"
    made = [served.ask("POST", "/v1/videos", data, Content_Type=kind).json]
    made.append(served.post(body))
    urls = {
        name: f"data:;base64,{base64.b64encode((case / file).read_bytes()).decode()}" for name, file in INPUTS.items()
    }
    made.append(served.post({**body, **urls}))
    videos = []
    for video in made:
        served.done(video["id"])
        videos.append(served.content(video["id"]))
    assert len(videos[0]) > 1000
    assert videos[0] == videos[1] == videos[2]


def test_what_is_wrong_with_inputs_is_said_at_once_in_the_command_lines_words(
    served: Served, case: Path, scail2: Run, engines: Path, body: dict[str, Any], tmp_path: Path
) -> None:
    shorter = write_clip(tmp_path / "shorter.mp4", read_video(case / "rendered_mask_v2.mp4").pixels[:-3], 16)
    broken, grey = tmp_path / "broken.mp4", tmp_path / "grey.png"
    broken.write_bytes((case / "rendered_v2.mp4").read_bytes()[:3000])
    grey.write_bytes((case / "ref_mask.png").read_bytes()[:200])
    for name, file in (("video_mask_reference", shorter), ("video_reference", broken), ("mask_reference", grey)):
        files = {field: case / INPUTS[field] for field in INPUTS} | {name: file}
        words = [word for field, path in files.items() for word in (PATHS[field], path)]
        expected = error_of(scail2("generate", engines, *words, *SMALL_WORDS, "-o", tmp_path / "x.mp4"))
        for field, path in files.items():
            expected = expected.replace(str(path), field)
        answer = served.ask("POST", "/v1/videos", {**body, name: {"file_id": served.upload(file)}})
        assert answer.status == 400
        assert answer.error == expected
    assert not list((served.data / "incoming").iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": "0", "seed": -1}, ("--steps", "0", "--seed", "-1")),
        ({"segment_length": 12}, ("--segment-length", "12")),
        ({"size": "97x64"}, ("--size", "64x97")),
        ({"guidance": "nan"}, ("--guidance", "nan")),
        ({"frames": 400}, ("--frames", "400")),
        ({"start": 21}, ("--start", "21")),
    ],
)
def test_numbers_are_refused_in_the_command_lines_words(
    served: Served,
    case: Path,
    scail2: Run,
    engines: Path,
    body: dict[str, Any],
    tmp_path: Path,
    change: Any,
    words: Any,
) -> None:
    told = scail2("generate", engines, "--case", case, *SMALL_WORDS, *words, "-o", tmp_path / "x.mp4")
    answer = served.ask("POST", "/v1/videos", {**body, **change})
    assert (answer.status, answer.error) == (400, error_of(told))


def test_types_in_the_description(served: Served) -> None:
    operation = served.ask("GET", "/openapi.json").json["paths"]["/v1/videos"]["post"]
    properties = operation["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert properties["points"] | properties["boxes"] == {
        "type": "array",
        "items": {"type": "string"},
        "description": properties["boxes"]["description"],
    }
    types = {"max_characters": "integer", "one_to_many": "boolean", "steps": "integer", "shift": "number"}
    assert {name: properties[name]["type"] for name in types} == types


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"output": "/etc/passwd"}, "The field output is set by the operator"),
        ({"backend": "torch"}, "The field backend is set by the operator"),
        ({"vram_limit": 1}, "The field vram_limit is set by the operator"),
        ({"driving": "/etc/passwd"}, "The field driving is set by the operator"),
        ({"nonsense": 1}, "The field 'nonsense' is not known"),
        ({"steps": "many"}, "--steps must be a whole number, not 'many'."),
        ({"steps": True}, "--steps must be a whole number, not 'True'."),
        ({"fit_reference": "perhaps"}, "The field fit_reference must be true or false"),
        ({"size": "64"}, "'64' is not a size"),
        ({"model": "sora-2"}, "The service has no model 'sora-2'"),
        ({"prompt": 5}, "The field prompt must be text"),
        ({"video_reference": "/etc/passwd"}, "video_reference must be a data:, http: or https: URL."),
        ({"video_reference": {"file_id": "file-0"}}, "There is no file 'file-0'."),
        ({"video_reference": None}, "video_reference is missing"),
        ({"mask_reference": None}, "mask_reference is missing"),
        ({"seconds": "-1"}, "seconds must be a number above 0"),
        ({"extra_refs": "[1]"}, "Extra references must be pairs"),
        ({"preset": "best"}, "--preset must be one of quality, fast, not best."),
    ],
)
def test_fields_that_cannot_be_are_refused(served: Served, body: dict[str, Any], change: Any, said: str) -> None:
    answer = served.ask("POST", "/v1/videos", {**body, **change})
    assert answer.status in (400, 404), answer.body
    assert answer.error.startswith(said)
    assert answer.json["error"]["code"]


def test_bodies_that_are_none_are_refused(served: Served) -> None:
    for data, kind, status in (
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"x", "text/plain", 415),
        (b"--b\r\n", "multipart/form-data; boundary=b", 400),
        (b"x", "multipart/form-data", 400),
        (
            b'--b\r\nContent-Disposition: form-data; name="a"; filename="f"\r\n\r\nhalf',
            "multipart/form-data; boundary=b",
            400,
        ),
    ):
        answer = served.ask("POST", "/v1/videos", data, Content_Type=kind)
        assert answer.status == status, (data[:20], answer.body)
    assert not list((served.data / "incoming").iterdir())


def test_waiting_for_the_video_in_one_request(served: Served, body: dict[str, Any]) -> None:
    answer = served.ask("POST", "/v1/videos/sync", body)
    assert answer.status == 200
    assert answer.body[4:8] == b"ftyp"
    assert float(answer.headers["x-inference-time-s"]) > 0
    assert json.loads(answer.headers["x-stage-durations"])["denoise"] > 0
    assert int(answer.headers["x-peak-memory-mb"]) > 0
    assert served.video(answer.headers["x-video-id"])["status"] == "completed"


def test_seconds_choose_the_frames(served: Served, body: dict[str, Any]) -> None:
    video = served.post({**body, "seconds": "0.5"})
    assert (video["frames"], video["seconds"]) == (8, "0.5")
    assert served.done(video["id"])["seconds"] == "0.5"


def test_extra_references_and_ranges(served: Served, case: Path, body: dict[str, Any]) -> None:
    pair = [{"file_id": served.upload(case / name)} for name in ("ref.png", "ref_mask.png")]
    video = served.done(served.post({**body, "extra_refs": [pair]})["id"])
    part = served.ask("GET", f"/v1/videos/{video['id']}/content", Range="bytes=4-7")
    assert (part.status, part.body) == (206, b"ftyp")
    assert served.ask("GET", f"/v1/videos/{video['id']}/content?variant=x").status == 400


def test_a_list_is_paged(served: Served, body: dict[str, Any]) -> None:
    made = [served.post(body)["id"] for _ in range(3)]
    for video_id in made:
        served.done(video_id)
    client = served.client()
    assert [video.id for video in client.videos.list(limit=1)][:3] == made[::-1]
    assert [video.id for video in client.videos.list(limit=2, order="asc")][-3:] == made
    assert served.ask("GET", "/v1/videos?limit=0").status == 400


def test_models_health_and_metrics(served: Served) -> None:
    assert [model.id for model in served.client().models.list()] == ["scail-2"]
    assert served.client().models.retrieve("scail-2").id == "scail-2"
    assert served.ask("GET", "/health").json == {"status": "ok"}
    assert served.ask("GET", "/ready").json == {"ready": True}
    text = served.ask("GET", "/metrics").body.decode()
    for name in ("scail2_jobs_queued 0.0", 'scail2_phase_seconds_total{phase="denoise"}', "scail2_workers_ready 1.0"):
        assert name in text
    assert served.ask("GET", "/nowhere").json["error"]["code"] == "http_error"
