"""A missing mask: the errors of all interfaces name the command that makes masks."""

import shlex
from pathlib import Path

import pytest

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime import Request
from tests.support.command import Run, error_of
from tests.support.mask_cases import make_case

pytest_plugins = ["tests.support.runtime_fixtures"]


@pytest.mark.parametrize("name", ["ref_mask.png", "rendered_mask_v2.mp4"])
def test_a_case_folder_without_a_mask(scail2: Run, engines: Path, tmp_path: Path, name: str) -> None:
    case = make_case(tmp_path / "a case")
    (case / name).unlink()
    for words in (("masks", "check"), ("generate", engines, "-o", tmp_path / "a.mp4")):
        message = error_of(scail2(*words, "--case", case))
        command = shlex.split(message.split("`")[1])
        assert command[:3] == ["scail2-rt", "masks", "make"]
        assert command[3:] == [
            "--image",
            str(case / "ref.png"),
            "--driving",
            str(case / "rendered_v2.mp4"),
            "-o",
            "DIR",
        ]


def test_a_case_folder_without_a_reference(scail2: Run, tmp_path: Path) -> None:
    case = make_case(tmp_path / "case")
    (case / "ref.png").unlink()
    assert "masks make" not in error_of(scail2("masks", "check", "--case", case))


def test_a_missing_mask_option(scail2: Run, engines: Path, tmp_path: Path) -> None:
    case = make_case(tmp_path / "case")
    files = ("--image", case / "ref.png", "--driving", case / "rendered_v2.mp4", "--mask-image", case / "ref_mask.png")
    for words in (("masks", "check"), ("generate", engines, "-o", tmp_path / "a.mp4")):
        message = error_of(scail2(*words, *files))
        assert "--mask-video is missing" in message
        assert "`scail2-rt masks make --image FILE --driving FILE -o DIR`" in message


def test_a_mask_file_that_does_not_exist(scail2: Run, engines: Path, tmp_path: Path) -> None:
    case = make_case(tmp_path / "case")
    files = ("--image", case / "ref.png", "--driving", case / "rendered_v2.mp4", "--mask-image", case / "ref_mask.png")
    words = ("generate", engines, "-o", tmp_path / "a.mp4", *files, "--mask-video", "nowhere.mp4")
    message = error_of(scail2(*words))
    assert "driving mask video nowhere.mp4 does not exist" in message
    assert "scail2-rt masks make" in message


def test_python(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"The driving mask video is None: .* `masks make`"):
        Request("a.png", "m.png", "a.mp4", None)  # type: ignore[arg-type]
