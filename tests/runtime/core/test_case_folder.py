"""Case folders and batch files."""

from pathlib import Path

import pytest

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.case_folder import read_batch, read_case


def folder(path: Path, *names: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        (path / name).touch()
    return path


class TestCase:
    def test_official_animate(self, tmp_path: Path) -> None:
        case = read_case(
            folder(tmp_path, "ref.jpg", "ref_mask.jpg", "rendered_v2.mp4", "rendered_mask_v2.mp4", "driving.mp4")
        )
        assert (case.image.name, case.mask_image.name) == ("ref.jpg", "ref_mask.jpg")
        assert (case.driving.name, case.mask_video.name) == ("rendered_v2.mp4", "rendered_mask_v2.mp4")
        assert case.mode == "animate"
        assert case.image.parent == tmp_path

    def test_replace_mask_means_replace(self, tmp_path: Path) -> None:
        names = ("ref_image.png", "ref_mask.png", "driving.mp4", "rendered_mask_v2.mp4", "replace_mask.mp4")
        case = read_case(folder(tmp_path, *names))
        assert (case.mode, case.mask_video.name, case.image.name) == ("replace", "replace_mask.mp4", "ref_image.png")
        forced = read_case(tmp_path, mode="animate")
        assert (forced.mode, forced.mask_video.name) == ("animate", "rendered_mask_v2.mp4")

    def test_forced_mode_takes_the_only_mask(self, tmp_path: Path) -> None:
        case = read_case(folder(tmp_path, "ref.png", "ref_mask.png", "driving.mp4", "replace_mask.mp4"), mode="animate")
        assert (case.mode, case.mask_video.name) == ("animate", "replace_mask.mp4")
        case = read_case(
            folder(tmp_path / "b", "ref.png", "ref_mask.png", "driving.mp4", "rendered_mask.mp4"), "replace"
        )
        assert (case.mode, case.mask_video.name) == ("replace", "rendered_mask.mp4")

    def test_precedence_of_driving_names(self, tmp_path: Path) -> None:
        order = ["rendered_v2.mp4", "rendered_aligned.mp4", "rendered.mp4", "driving.mp4"]
        folder(tmp_path, "ref.jpg", "ref_mask.png", "rendered_mask_v2.mp4", *order)
        for name in order:
            assert read_case(tmp_path).driving.name == name
            (tmp_path / name).unlink()
        with pytest.raises(InputError, match=r"rendered_v2[.]mp4 or .*or rendered[.]mp4 or driving"):
            read_case(tmp_path)

    def test_capital_endings(self, tmp_path: Path) -> None:
        case = read_case(folder(tmp_path, "ref.JPG", "ref_mask.PNG", "driving.MP4", "replace_mask.MP4"))
        assert (case.image.name, case.driving.name, case.mode) == ("ref.JPG", "driving.MP4", "replace")

    def test_videos_of_other_containers(self, tmp_path: Path) -> None:
        case = read_case(folder(tmp_path, "ref.png", "ref_mask.png", "driving.mov", "replace_mask.mkv"))
        assert (case.driving.name, case.mask_video.name, case.mode) == ("driving.mov", "replace_mask.mkv", "replace")
        assert read_case(folder(tmp_path, "driving.mp4")).driving.name == "driving.mp4"
        assert read_case(folder(tmp_path, "rendered.webm")).driving.name == "rendered.webm"

    def test_all_missing_files_are_listed(self, tmp_path: Path) -> None:
        with pytest.raises(InputError) as caught:
            read_case(folder(tmp_path, "driving.mp4", "notes.txt"))
        message = str(caught.value)
        for part in (
            "the reference image (ref.jpg",
            "the reference mask (ref_mask.png",
            "replace_mask.mp4",
            "notes.txt",
        ):
            assert part in message
        assert "the driving video" not in message

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="does not exist"):
            read_case(tmp_path / "none")
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match="is a file"):
            read_case(tmp_path / "file")
        with pytest.raises(InputError, match="It holds no file"):
            read_case(folder(tmp_path / "empty"))


class TestBatch:
    def test_lines(self, tmp_path: Path) -> None:
        text = "\ufeff# prompts\n\nA dancer @ night@@cases/a\nNone@@/elsewhere/b\n  spaced  @@  c \n@@d\nx@@y@@e\n"
        (tmp_path / "batch.txt").write_text(text, encoding="utf-8")
        lines = read_batch(tmp_path / "batch.txt")
        assert [(line.prompt, line.directory, line.number) for line in lines] == [
            ("A dancer @ night", tmp_path / "cases/a", 3),
            ("", Path("/elsewhere/b"), 4),
            ("spaced", tmp_path / "c", 5),
            ("", tmp_path / "d", 6),
            ("x@@y", tmp_path / "e", 7),
        ]

    @pytest.mark.parametrize("bad", ["only a prompt", "prompt@@", "prompt@cases/a"])
    def test_bad_line_is_numbered(self, tmp_path: Path, bad: str) -> None:
        (tmp_path / "batch.txt").write_text(f"good@@a\n# note\n{bad}\n")
        with pytest.raises(InputError, match=r"Line 3 of .*batch\.txt is not `prompt@@case_dir`"):
            read_batch(tmp_path / "batch.txt")

    def test_unreadable(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="cannot be read"):
            read_batch(tmp_path / "none.txt")
        (tmp_path / "batch.txt").write_bytes(b"\xff\xfe\x00bad")
        with pytest.raises(InputError, match="not UTF-8"):
            read_batch(tmp_path / "batch.txt")
        (tmp_path / "batch.txt").write_text("# nothing\n\n")
        with pytest.raises(InputError, match="holds no case"):
            read_batch(tmp_path / "batch.txt")
