"""`scail2-rt download` through the installed command, with a hub on this machine and without a hub."""

import hashlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from scail2_rt.export.checkpoint.open import open_checkpoint
from scail2_rt.export.checkpoint.random_checkpoint import SAT_FILE, TOKENIZER_FILE, VAE_FILE
from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.runtime.cli import files_commands
from scail2_rt.runtime.jobs.download import DISK_MARGIN, PIECE, RECORD, REPOSITORY, download
from tests.support.command import SCAIL2_RT, Run, command_environment, error_of, one_json, unmeasured
from tests.support.hub import COMMIT, Direct, FakeHub, serve
from tests.support.small import Steps

pytest_plugins = ["tests.support.runtime_fixtures"]

UNWANTED = {
    "README.md": b"# SCAIL-2",
    "assets/teaser.mp4": b"0" * 5000,
    "model/bias-aware-dpo-lora.pt": b"1" * 5000,
    "umt5-xxl/spiece.model": b"2" * 5000,
}


@pytest.fixture(scope="module")
def content(tiny_checkpoint: Path) -> dict[str, bytes]:
    """The tiny checkpoint's files by their paths in the repository."""
    files = [file for file in tiny_checkpoint.rglob("*") if file.is_file()]
    return {str(file.relative_to(tiny_checkpoint)): file.read_bytes() for file in files}


@pytest.fixture
def hub(content: dict[str, bytes]) -> Iterator[FakeHub]:
    with serve({**content, **UNWANTED}) as running:
        yield running


def at(hub: FakeHub) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "127.0.0.1,localhost"}


def test_the_default_repository_is_the_one_that_help_names() -> None:
    assert files_commands.REPOSITORY == REPOSITORY


def test_a_checkpoint_arrives_whole_and_opens(
    scail2: Run, hub: FakeHub, content: dict[str, bytes], tmp_path: Path
) -> None:
    result = scail2("download", tmp_path / "c", "--json", **at(hub))
    assert result.returncode == 0, result.stderr
    reply = one_json(result)
    assert reply["commit"] == COMMIT
    assert reply["fetched"] == reply["size"] == sum(map(len, content.values()))
    assert reply["missing"] == []
    assert reply["files"][SAT_FILE] == hashlib.sha256(content[SAT_FILE]).hexdigest()
    found = {str(f.relative_to(tmp_path / "c")): f.read_bytes() for f in (tmp_path / "c").rglob("*") if f.is_file()}
    assert found.pop(RECORD)
    assert found == content  # no other files: no LoRA, no assets
    assert f"download 5/5 {SAT_FILE}" in result.stderr
    open_checkpoint(tmp_path / "c")
    hub.asked.clear()
    again = one_json(scail2("download", tmp_path / "c", "--json", **at(hub)))
    assert (again["fetched"], again["files"], hub.asked) == (0, reply["files"], [])


def test_files_that_are_there_already_are_checked_and_wrong_ones_replaced(
    content: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / SAT_FILE).parent.mkdir(parents=True)
    (tmp_path / SAT_FILE).write_bytes(content[SAT_FILE])
    (tmp_path / VAE_FILE).write_bytes(bytes(len(content[VAE_FILE])))
    hub, steps = FakeHub(content), Steps()
    download(tmp_path, Direct(hub), observer=steps)
    assert f"{tmp_path / VAE_FILE} differs from the file in zai-org/SCAIL-2 and will be replaced" in steps.notes
    assert {SAT_FILE, VAE_FILE} <= set(steps.names("check"))  # with progress, because hashing a real file takes minutes
    assert {path for path, _ in hub.asked} == set(content) - {SAT_FILE}
    assert (tmp_path / VAE_FILE).read_bytes() == content[VAE_FILE]


def test_kill_then_go_on_where_it_stopped(scail2: Run, cache: Path, content: dict[str, bytes], tmp_path: Path) -> None:
    large = os.urandom(3 * PIECE + 1000)
    with serve({**content, SAT_FILE: large}) as hub:
        hub.stalls = (SAT_FILE, 2 * PIECE)
        process = subprocess.Popen(
            [SCAIL2_RT, "download", tmp_path],
            env=unmeasured(command_environment(cache, **at(hub))),
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while sum(f.stat().st_size for f in tmp_path.rglob("fsdp2*.partial")) < 2 * PIECE:
            assert time.monotonic() < deadline, "nothing arrives"
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / SAT_FILE).exists()
        hub.stalls = None
        hub.go.set()
        hub.asked.clear()
        reply = one_json(scail2("download", tmp_path, "--json", **at(hub)))
        starts = sorted(first for path, first in hub.asked if path == SAT_FILE)
    assert starts == [2 * PIECE, 3 * PIECE]
    assert reply["fetched"] == len(large) - 2 * PIECE
    assert (tmp_path / SAT_FILE).read_bytes() == large
    assert not list(tmp_path.rglob("*.partial"))


def test_ctrl_c_says_that_the_same_command_continues(cache: Path, content: dict[str, bytes], tmp_path: Path) -> None:
    with serve(content) as hub:
        hub.stalls = (SAT_FILE, 0)
        words = [SCAIL2_RT, "download", tmp_path / "c"]
        environment = command_environment(cache, **at(hub))
        process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while (SAT_FILE, 0) not in hub.asked:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        hub.go.set()  # pending requests are waited for
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "The part that was fetched is kept. Run the same command again to continue." in told
    assert told.endswith("error: interrupted\n")
    assert not (tmp_path / "c" / SAT_FILE).exists()


def test_a_damaged_file_is_not_kept(content: dict[str, bytes], tmp_path: Path) -> None:
    hub = FakeHub(content, lies={VAE_FILE, "model/latest"})
    for file in ("model/latest", VAE_FILE):  # one file with git's hash, one with SHA-256
        with pytest.raises(Scail2Error, match=f"{file} arrived damaged") as caught:
            download(tmp_path, Direct(hub))
        assert caught.value.exit_code == 1
        assert not list(tmp_path.rglob(f"{Path(file).name}*"))
        hub.lies.remove(file)
    assert download(tmp_path, Direct(hub)).fetched > 0


def test_a_partial_file_of_another_version_is_not_continued(content: dict[str, bytes], tmp_path: Path) -> None:
    old = FakeHub({**content, VAE_FILE: b"old" * 5000}, lies={VAE_FILE})
    with pytest.raises(Scail2Error):
        download(tmp_path, Direct(old))
    old.lies.clear()
    download(tmp_path, Direct(old))
    download(tmp_path, Direct(FakeHub(content)))
    assert (tmp_path / VAE_FILE).read_bytes() == content[VAE_FILE]


def test_room_is_asked_for_before_anything_large_comes(
    content: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(content)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=DISK_MARGIN + 1000))
    with pytest.raises(InputError, match="GiB are still to be fetched, but the disk of"):
        download(tmp_path, Direct(hub))
    assert [path for path, _ in hub.asked] == ["model/latest"]


def test_only_the_folder_that_latest_names_is_taken(content: dict[str, bytes], tmp_path: Path) -> None:
    other = SAT_FILE.replace("model/1/", "model/2/")
    hub = FakeHub({**content, other: b"3" * 5000})
    assert other not in download(tmp_path / "a", Direct(hub)).files
    hub.files["model/latest"] = b"7"
    with pytest.raises(InputError, match=r"names '7', but the repository has no model/7/\*\.pt"):
        download(tmp_path / "b", Direct(hub))


@pytest.mark.parametrize(
    "environment",
    [{"HF_ENDPOINT": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}, {"HF_HUB_OFFLINE": "1"}],
    ids=["unreachable", "offline mode"],
)
def test_offline_is_one_sentence(scail2: Run, tmp_path: Path, environment: dict[str, str]) -> None:
    result = scail2("download", tmp_path / "c", **environment)
    message = error_of(result, code=1)
    assert message.startswith("The hub cannot be reached (")
    assert "copy the folder." in message
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "c").exists()


def test_a_hub_that_loses_a_file_half_way(scail2: Run, content: dict[str, bytes], tmp_path: Path) -> None:
    with serve(content) as hub:
        hub.listed = dict(content)
        hub.files.pop(VAE_FILE)
        message = error_of(scail2("download", tmp_path, **at(hub)), code=1)
    assert message.startswith(f"{VAE_FILE} cannot be fetched from the hub (")


def test_another_repository_is_refused(scail2: Run, hub: FakeHub, tmp_path: Path) -> None:
    message = error_of(scail2("download", tmp_path / "c", "--repo", "nobody/nothing", **at(hub)))
    assert "The hub has no nobody/nothing at revision main" in message
    assert not (tmp_path / "c").exists()


def test_missing_parts_are_named(content: dict[str, bytes], tmp_path: Path) -> None:
    hub = FakeHub({path: data for path, data in content.items() if path not in (VAE_FILE, "model/latest")})
    with pytest.raises(InputError, match="has no VAE, no model/latest"):
        download(tmp_path / "c", Direct(hub))
    assert not (tmp_path / "c").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"is a file\. Give a folder"):
        download(tmp_path / "file", Direct(hub))


def test_a_missing_tokenizer_is_told_and_the_rest_arrives(content: dict[str, bytes], tmp_path: Path) -> None:
    hub = FakeHub({path: data for path, data in content.items() if path != TOKENIZER_FILE})
    report = download(tmp_path, Direct(hub))
    assert report.missing == (TOKENIZER_FILE,)
    assert f"{TOKENIZER_FILE} is not in the repository: use the one of google/umt5-xxl" in report.text
    assert set(report.files) == set(hub.files)
