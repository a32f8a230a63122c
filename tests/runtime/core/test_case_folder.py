"""Case folders and batch files."""

from pathlib import Path

import pytest

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.case_folder import read_batch, read_case, read_text, read_unmasked_case, refuse_url


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
            "the reference image (ref.png",
            "the reference mask (ref_mask.png",
            "replace_mask.mp4",
            "notes.txt",
        ):
            assert part in message
        assert "the driving clip" not in message

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="does not exist"):
            read_case(tmp_path / "none")
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match="is a file"):
            read_case(tmp_path / "file")
        with pytest.raises(InputError, match="It holds no file"):
            read_case(folder(tmp_path / "empty"))

    def test_choices_and_the_prompt_file_are_reported(self, tmp_path: Path) -> None:
        names = ("ref.png", "ref.jpg", "ref_mask.png", "rendered.mp4", "driving.mov", "driving.mp4")
        case = read_case(folder(tmp_path, *names, "rendered_mask_v2.mp4", "replace_mask.mp4", "prompt.txt"))
        assert case.choices == "ref.png (not ref.jpg), rendered.mp4 (not driving.mp4, driving.mov)"
        assert case.prompt_file == tmp_path / "prompt.txt"
        assert (case.mode, case.mask_video.name) == ("replace", "replace_mask.mp4")
        names = ("rendered_mask_v2.mp4", "rendered_mask.mp4")
        case = read_case(folder(tmp_path / "b", "ref.png", "ref_mask.png", "driving.mp4", *names))
        assert case.choices == "rendered_mask_v2.mp4 (not rendered_mask.mp4)"
        assert case.prompt_file is None

    def test_a_missing_mask_names_the_command_that_makes_it(self, tmp_path: Path) -> None:
        case = folder(tmp_path / "my case", "ref.png", "ref_mask.png", "driving.mp4")
        with pytest.raises(InputError, match=r"masks make --image '.*my case/ref.png' --driving '.*my case/driving"):
            read_case(case)
        assert read_unmasked_case(case) is None
        (case / "ref_mask.png").unlink()
        found = read_unmasked_case(case)
        assert found is not None
        assert (found.image.name, found.driving.name, found.choices) == ("ref.png", "driving.mp4", "")


class TestText:
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
    def test_encodings_with_a_byte_order_mark(self, tmp_path: Path, encoding: str) -> None:
        (tmp_path / "p.txt").write_text("eine Tänzerin 跳舞", encoding=encoding)
        assert read_text("prompt file", tmp_path / "p.txt") == "eine Tänzerin 跳舞"

    @pytest.mark.parametrize(
        ("data", "says"),
        [
            ("x\neine Tänzerin".encode("latin-1"), r"not UTF-8 text \(byte 0xe4 in line 2\): .* `iconv -f LATIN1"),
            ("a girl".encode("utf-16-le"), "UTF-16 without a byte order mark"),
            (b"\xff\xfea", r"not UTF-16 text .*save it as UTF-8"),
        ],
    )
    def test_other_encodings_are_refused(self, tmp_path: Path, data: bytes, says: str) -> None:
        (tmp_path / "p.txt").write_bytes(data)
        with pytest.raises(InputError, match=f"The prompt file .*p.txt .*{says}"):
            read_text("prompt file", tmp_path / "p.txt")

    def test_urls_are_refused(self, tmp_path: Path) -> None:
        for url in ("https://host/a.txt", "s3://bucket/a.txt"):
            for source in (url, Path(url)):
                with pytest.raises(InputError, match=f"The prompt file {url} is a URL: download it first"):
                    refuse_url("prompt file", source)
        for path in ("C:/a.txt", "a/b:c/d.txt", "12:30.mp4"):
            refuse_url("prompt file", Path(path))


class TestBatch:
    def test_lines(self, tmp_path: Path) -> None:
        text = "\ufeff# prompts\n\nA dancer @ night@@cases/a\nNone@@/elsewhere/b\r\n  spaced  @@  c \n@@d\nx@@y@@e\n"
        (tmp_path / "batch.txt").write_text(text + '{"case": "f", "steps": 4}\n', encoding="utf-8", newline="")
        assert [(line.number, line.options) for line in read_batch(tmp_path / "batch.txt")] == [
            (3, {"case": "cases/a", "prompt": "A dancer @ night"}),
            (4, {"case": "/elsewhere/b", "prompt": ""}),
            (5, {"case": "c", "prompt": "spaced"}),
            (6, {"case": "d"}),
            (7, {"case": "e", "prompt": "x@@y"}),
            (8, {"case": "f", "steps": 4}),
        ]

    @pytest.mark.parametrize(
        ("bad", "says"),
        [
            ("only a prompt", "'only a prompt' is neither `prompt@@case_dir` nor a JSON object"),
            ("prompt@@", "is neither"),
            ("prompt@cases/a", "is neither"),
            ('{"case": "a"', r"is not valid JSON \(.*\): write one object per line"),
        ],
    )
    def test_a_malformed_line_has_an_error(self, tmp_path: Path, bad: str, says: str) -> None:
        (tmp_path / "batch.txt").write_text(f"good@@a\n# note\n{bad}\n")
        good, wrong = read_batch(tmp_path / "batch.txt")
        assert good.error is None
        assert wrong.number == 3
        with pytest.raises(InputError, match=says):
            raise wrong.error or AssertionError

    def test_unreadable(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="cannot be read"):
            read_batch(tmp_path / "none.txt")
        (tmp_path / "batch.txt").write_text("# nothing\n\n")
        with pytest.raises(InputError, match="holds no case"):
            read_batch(tmp_path / "batch.txt")
