"""`generate --server`: the same options, files and sentences as a local run."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.command import SCAIL2_RT, SMALL, Run, command_environment, error_of, one_json, read_video
from tests.support.served import LONG, Served, serving, wait_for

pytest_plugins = ["tests.support.runtime_fixtures"]
DIFFER = (
    "timings_s",
    "memory",
    "prompt_cache",
    "placement",
    "resumed_after_segments",
    "server",
    "video_id",
    "warnings",
)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_files_are_those_of_a_local_run(
    served: Served, engines: Path, case: Path, scail2: Run, tmp_path: Path
) -> None:
    words = (
        "--case",
        case,
        *SMALL,
        "--prompt",
        "a man",
        "--seed",
        "4",
        "--frames",
        "9",
        "--crf",
        "20",
        "--no-metadata",
    )
    made = {}
    for name, where in (("local", (engines,)), ("served", ("--server", served.url))):
        folder = tmp_path / name
        result = scail2("generate", *where, *words, "-o", folder / "a.mp4", "--json")
        assert result.returncode == 0, result.stderr
        made[name] = one_json(result)
    assert files(tmp_path / "served") == files(tmp_path / "local") == {"a.mp4", "a.json"}
    ours, theirs = (tmp_path / name / "a.mp4" for name in made)
    assert ours.read_bytes() == theirs.read_bytes()
    reports = [json.loads((tmp_path / name / "a.json").read_text()) for name in made]
    local, remote = ({key: value for key, value in report.items() if key not in DIFFER} for report in reports)
    text = json.dumps(remote).replace(str(tmp_path / "served"), str(tmp_path / "local"))
    remote = json.loads(text)
    assert set(remote) == set(local)
    for options in (local["options"], remote["options"]):
        options.pop("resume")  # the service always resumes
    place = Path(local["engines"].pop("directory"))  # where a service's engines are is its operator's
    assert remote["engines"].pop("directory") == place.name
    assert remote == local
    before = len(served.ask("GET", "/v1/files").json["data"])
    result = scail2("generate", "--server", served.url, *words, "-o", tmp_path / "again" / "b.mp4")
    assert result.returncode == 0, result.stderr
    assert len(served.ask("GET", "/v1/files").json["data"]) == before
    assert "9 frames of 64x96 at 16 fps, 1 segment in" in result.stdout


def test_a_served_video_holds_its_settings_when_the_client_asks(
    served: Served, engines: Path, case: Path, scail2: Run, tmp_path: Path
) -> None:
    words = ("--case", case, *SMALL, "--seed", "4", "--frames", "5")
    assert scail2("generate", "--server", served.url, *words, "-o", tmp_path / "a.mp4").returncode == 0
    result = scail2("generate", engines, "--from-video", tmp_path / "a.mp4", "-o", tmp_path / "b.mp4")
    assert result.returncode == 0, result.stderr
    result = scail2("generate", "--server", served.url, "--from-video", tmp_path / "b.mp4", "-o", tmp_path / "c.mp4")
    assert result.returncode == 0, result.stderr
    first, *others = (read_video(tmp_path / name).pixels for name in ("a.mp4", "b.mp4", "c.mp4"))
    assert all(np.array_equal(first, pixels) for pixels in others)
    message = error_of(scail2("generate", "--server", served.url, *words, "-o", tmp_path / "a.gif"))
    assert "End the output" in message


def test_errors_are_those_of_a_local_run(
    served: Served, engines: Path, case: Path, scail2: Run, tmp_path: Path
) -> None:
    there = tmp_path / "there.mp4"
    there.write_bytes(b"x")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes((case / "rendered_v2.mp4").read_bytes()[:3000])
    own = ("--image", case / "ref.png", "--mask-image", case / "ref_mask.png", "--driving", broken)
    for words, output in (
        (("--case", case, "--start", "30"), "a.mp4"),
        (("--case", case, "--steps", "0"), "a.mp4"),
        (("--case", tmp_path / "none"), "a.mp4"),
        (("--case", case), "there.mp4"),
        (("--case", case, "--crf", "99"), "a.mp4"),
        (("--case", case, "--size", "65x96"), "a.mp4"),
        ((*own, "--mask-video", case / "rendered_mask_v2.mp4"), "a.mp4"),
        ((*own, "--mask-video", case / "no.mp4"), "a.mp4"),
    ):
        local = scail2("generate", engines, *SMALL[2:], *words, "-o", tmp_path / output)
        remote = scail2("generate", "--server", served.url, *SMALL[2:], *words, "-o", tmp_path / output)
        assert error_of(remote) == error_of(local)
    assert files(tmp_path) == {"there.mp4", "broken.mp4"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--backend", "torch"), "--backend is set by the operator of the service."),
        (("--vram-limit", "4GiB"), "--vram-limit is set by the operator of the service."),
        (("--dry-run",), "--dry-run describes local engines."),
        (("--resume",), "--resume cannot be used with --server"),
    ],
)
def test_options_of_the_operator_are_refused(
    served: Served, case: Path, scail2: Run, tmp_path: Path, words: Any, said: str
) -> None:
    result = scail2("generate", "--server", served.url, "--case", case, *words, "-o", tmp_path / "a.mp4")
    assert error_of(result).startswith(said)


def test_addresses_that_are_none(engines: Path, case: Path, scail2: Run, tmp_path: Path) -> None:
    for url, code, said in (
        ("ftp://x", 2, "ftp://x is not the address of a service"),
        ("http://127.0.0.1:1", 1, "The service at http://127.0.0.1:1 cannot be reached"),
    ):
        result = scail2("generate", "--server", url, "--case", case, "-o", tmp_path / "a.mp4")
        assert error_of(result, code).startswith(said)
    both = scail2("generate", engines, "--server", "http://127.0.0.1:1", "--case", case, "-o", tmp_path / "a.mp4")
    assert "were both given" in error_of(both)
    assert "ENGINES" in error_of(scail2("generate", "--case", case, "-o", tmp_path / "a.mp4"))


def test_a_batch_and_a_failure_in_it(served: Served, case: Path, scail2: Run, tmp_path: Path) -> None:
    batch = tmp_path / "batch.txt"
    line = json.dumps({"case": str(case), "prompt": "a man", "fps": 8, "seed": 4})
    batch.write_text(f"None@@{case}\na man@@{tmp_path / 'none'}\n{line}\n")
    result = scail2("generate", "--server", served.url, "--batch", batch, *SMALL, "--frames", "5", "-o", tmp_path / "o")
    assert result.returncode == 1, result.stderr
    assert result.stdout.splitlines()[-1] == f"2 of 3 cases done, 1 failed: line 2, {tmp_path / 'none'}"
    assert files(tmp_path / "o") == {"walk.mp4", "walk.json", "walk-2.mp4", "walk-2.json"}
    reports = [json.loads((tmp_path / "o" / f"{name}.json").read_text()) for name in ("walk", "walk-2")]
    assert [(report["frame_rate"], report["seed"]) for report in reports] == [("16", 0), ("8", 4)]


def test_ctrl_c_ends_the_job(served: Served, case: Path, cache: Path, tmp_path: Path) -> None:
    words = [*SMALL[:2], "--steps", LONG["steps"], "--case", str(case), "-o", str(tmp_path / "a.mp4")]
    command = subprocess.Popen(
        [str(SCAIL2_RT), "generate", "--server", served.url, *words],
        stderr=subprocess.PIPE,
        text=True,
        env=command_environment(cache),
    )
    listed: list[dict[str, Any]] = []

    def runs() -> bool:
        listed[:] = [v for v in served.ask("GET", "/v1/videos").json["data"] if v["status"] == "in_progress"]
        return bool(listed)

    wait_for(runs)
    command.send_signal(signal.SIGINT)
    _, said = command.communicate(timeout=60)
    assert command.returncode == 130, said
    assert "cancelled: the job was deleted at the service" in said
    assert served.ask("GET", f"/v1/videos/{listed[0]['id']}").status == 404
    assert files(tmp_path) == set()


def test_a_service_that_is_killed_and_comes_back(engines: Path, case: Path, cache: Path, tmp_path: Path) -> None:
    """A restarted service keeps its port, so that the client finds it. The API key comes from the environment."""
    keys = tmp_path / "keys"
    keys.write_text("a-key-of-the-command-line\n")
    options = ("--api-key-file", str(keys))
    with serving(engines, tmp_path / "data", cache, *options) as own:
        own.key = "a-key-of-the-command-line"
        words = [*SMALL[:2], "--steps", "100", "--segment-length", "9", "--case", str(case)]
        output = tmp_path / "o" / "a.mp4"
        command = subprocess.Popen(
            [str(SCAIL2_RT), "generate", "--server", own.url, *words, "-o", str(output)],
            stderr=subprocess.PIPE,
            text=True,
            env=command_environment(cache, SCAIL2_RT_API_KEY=own.key),
        )
        wait_for(lambda: own.ask("GET", "/v1/videos").json["data"][:1] != [])
        (video,) = own.ask("GET", "/v1/videos").json["data"]
        own.wait(video["id"], lambda video: video["status"] == "in_progress")
        port = own.url.rsplit(":", 1)[1]
        own.kill()
        own._words[own._words.index("--port") + 1] = port
        own.start()
        _, said = command.communicate(timeout=120)
        assert command.returncode == 0, said
        assert output.is_file()
