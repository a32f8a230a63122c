"""Outputs of every kind through the installed command, the settings stored in them, and runs repeated from them."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from scail2_rt.benchmarks.sprites.world.case_files import draw_case
from scail2_rt.runtime.media.unfinished import resumable
from scail2_rt.runtime.session.report import file_hash
from tests.support.command import SMALL, Run, error_of, one_json, read_video, signal_at

pytest_plugins = ["tests.support.runtime_fixtures"]
KINDS = ("a.mp4", "a.mov", "a.mkv", "a.webm", "a.gif", "frames")
OPTIONS = (*SMALL, "--prompt", "a man walks", "--seed", "3")


@pytest.fixture(scope="module")
def made(scail2: Run, engines: Path, case: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind of output → an output of this kind, with its report beside it."""
    folder = tmp_path_factory.mktemp("made")
    outputs = {name: folder / name.replace(".", "-") / name for name in KINDS}
    for output in outputs.values():
        result = scail2("generate", engines, "--case", case, "-o", output, *OPTIONS)
        assert result.returncode == 0, result.stderr
        lost = output.suffix not in (".mp4", ".mov", ".mkv", ".webm")
        assert result.stderr.count(" holds no audio: ") == lost
        assert {path.name for path in output.parent.iterdir()} == {output.name, f"{output.stem}.json"}
    return outputs


def test_every_kind_holds_the_same_frames(made: dict[str, Path]) -> None:
    """PNG files are lossless; the others are within the error of their codec."""
    frames = np.stack([np.asarray(Image.open(path)) for path in sorted(made["frames"].iterdir())])
    assert [path.name for path in sorted(made["frames"].iterdir())] == [f"{n:06d}.png" for n in range(21)]
    for name in KINDS[:-1]:
        video = read_video(made[name])
        assert video.pixels.shape == frames.shape == (21, 64, 96, 3)
        assert np.abs(video.pixels.astype(int) - frames).mean() < 12
        if name != "a.gif":
            assert video.frame_rate == 16
            assert abs(video.audio_s - 21 / 16) < 0.05
    with av.open(str(made["a.webm"])) as container:
        assert [stream.codec_context.name for stream in container.streams] == ["vp9", "opus"]


@pytest.mark.parametrize("name", KINDS)
def test_a_run_is_repeated_from_its_output_bit_by_bit(
    scail2: Run, engines: Path, made: dict[str, Path], tmp_path: Path, name: str
) -> None:
    result = scail2("generate", engines, "--from-video", made[name], "-o", tmp_path / name)
    assert result.returncode == 0, result.stderr
    assert "bit-identical" not in result.stderr
    assert file_hash(tmp_path / name) == file_hash(made[name])


@pytest.mark.parametrize("name", ["a.webm", "a.gif", "frames"])
def test_a_killed_run_is_resumed_bit_by_bit(
    scail2: Run, engines: Path, case: Path, made: dict[str, Path], tmp_path: Path, name: str
) -> None:
    words, output = ("--case", case, "-o", tmp_path / "o" / name, *OPTIONS), tmp_path / "o" / name
    (tmp_path / "sabotage").mkdir()
    result = scail2("generate", engines, *words, measured=False, **signal_at(tmp_path / "sabotage", output, 1))
    assert result.returncode == -signal.SIGKILL
    assert resumable(output) == 1
    assert not output.exists()
    assert "1 finished segment of an interrupted run" in error_of(scail2("generate", engines, *words))
    reply = one_json(scail2("generate", engines, *words, "--resume", "--json"))
    assert reply["resumed_after_segments"] == 1
    assert reply["output_sha256"] == file_hash(output) == file_hash(made[name])
    assert {path.name for path in output.parent.iterdir()} == {output.name, f"{output.stem}.json"}
    again = scail2("generate", engines, *words, "--resume")
    assert "is complete: nothing to resume" in again.stderr
    assert "exists. Choose another name" in error_of(scail2("generate", engines, *words))


def test_a_folder_is_replaced_only_if_it_holds_frames(scail2: Run, engines: Path, case: Path, tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    words = ("generate", engines, "--case", case, "-o", f"{folder}/", *OPTIONS, "--overwrite", "--frames")
    for frames in (9, 5):
        assert scail2(*words, frames).returncode == 0
        assert len(list(folder.iterdir())) == frames
    inside = error_of(scail2(*words, 5, "--extra-ref", folder / "000000.png", case / "ref_mask.png"))
    assert "holds the extra reference 1" in inside
    (folder / "notes.txt").write_text("mine")
    assert "holds files that are not frames" in error_of(scail2(*words, 5))
    assert len(list(folder.iterdir())) == 6
    assert {path.name for path in tmp_path.iterdir()} == {"frames", "frames.json"}


@pytest.mark.parametrize(
    ("output", "options", "says"),
    [
        ("a.webm", ("--codec", "h264"), "A .webm file cannot hold h264 video: use --codec vp9 or av1"),
        ("a.gif", ("--codec", "h264"), "A .gif file has no choice of --codec"),
        ("frames", ("--crf", "20"), "A folder of PNG files has no choice of --crf"),
        ("a.webm", ("--crf", "64"), "must be 0 to 63 for vp9"),
        ("a.avi", (), "must end in .mp4, .m4v, .mov, .mkv, .webm or .gif"),
        ("é" * 120 + ".gif", (), "is too long: make it 15 bytes shorter"),
    ],
)
def test_codec_and_crf_are_checked_against_the_kind(
    scail2: Run, engines: Path, case: Path, tmp_path: Path, output: str, options: tuple[str, ...], says: str
) -> None:
    words = ("generate", engines, "--case", case, "-o", tmp_path / output, *OPTIONS, *options)
    assert says in error_of(scail2(*words))
    assert not list(tmp_path.iterdir())


# settings


def stored(path: Path) -> dict[str, object]:
    with av.open(str(path)) as container:
        return json.loads(container.metadata["comment"])["scail2_rt"]


def retagged(source: Path, target: Path, change: Callable[[str], str]) -> Path:
    """A copy of a video with another comment, as another tool may write it."""
    with av.open(str(source)) as read, av.open(str(target), "w") as written:
        written.metadata["comment"] = change(read.metadata["comment"])
        stream = read.streams.video[0]
        copy = written.add_stream_from_template(stream)
        for packet in read.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                written.mux(packet)
    return target


def test_settings_hold_names_and_hashes_and_no_path(
    scail2: Run, engines: Path, case: Path, made: dict[str, Path], tmp_path: Path
) -> None:
    settings = stored(made["a.mp4"])
    assert settings["inputs"]["image"] == {"name": "ref.png", "sha256": file_hash(case / "ref.png")}  # type: ignore[index]
    options = settings["options"]
    assert isinstance(options, dict)
    asked = {"prompt": "a man walks", "seed": 3, "steps": 2, "size": "64x96", "mode": "animate", "codec": "h264"}
    assert options.items() >= asked.items()
    text = json.dumps(settings)
    assert not any(str(path) in text for path in (case.parent, engines.parent, made["a.mp4"].parent))
    words = ("generate", engines, "--case", case, *OPTIONS, "--frames", "5", "--no-metadata")
    for name in ("b.mp4", "b.gif"):
        result = scail2(*words, "-o", tmp_path / name)
        assert result.returncode == 0
        assert (f"The report {tmp_path / 'b.json'} is that of b.mp4, and is replaced" in result.stderr) == (
            name == "b.gif"
        )
        message = error_of(scail2("generate", engines, "--from-video", tmp_path / name, "-o", tmp_path / "c.mp4"))
        assert "holds no settings of scail2-rt" in message
    report = tmp_path / "b.json"
    repeated = one_json(scail2("generate", engines, "--from-video", report, "-o", tmp_path / "c.mp4", "--json"))
    assert (repeated["frames"], repeated["options"]["seed"]) == (5, 3)


def test_what_the_command_line_gives_wins_and_inputs_are_found_by_hash(
    scail2: Run, engines: Path, case: Path, made: dict[str, Path], tmp_path: Path
) -> None:
    words = ("generate", engines, "-o", tmp_path / "b.webm", "--overwrite", "--json")
    video = retagged(made["a.mp4"], tmp_path / "sent.mkv", lambda comment: comment)
    assert "ref.png of" in error_of_json(scail2(*words, "--from-video", video))
    for number, path in enumerate(sorted(case.iterdir())):
        shutil.copyfile(path, tmp_path / f"{number}{path.suffix}")
    changes = ("--preset", "fast", "--steps", "1", "--seed", "8", "--frames", "5")
    options = one_json(scail2(*words, "--from-video", video, *changes))["options"]
    assert (options["scheduler"], options["steps"], options["seed"], options["codec"]) == ("euler", 1, 8, "vp9")
    assert (options["prompt"], options["segment_length"]) == ("a man walks", 13)
    draw_case(tmp_path / "other", frames=13)
    result = scail2(*words, "--from-video", video, "--case", tmp_path / "other", "--steps", "1")
    assert one_json(result)["frames"] == 13
    assert "is not the driving clip of" in result.stderr
    image = tmp_path / "other" / "rendered_v2.mp4"
    message = error_of_json(scail2(*words, "--from-video", video, "--driving", image))
    assert "--mask-video is missing" in message  # the mask of the other clip would not fit


def error_of_json(result: object) -> str:
    return str(json.loads(result.stdout)["error"])  # type: ignore[attr-defined]


def _with(**changes: object) -> Callable[[str], str]:
    def change(comment: str) -> str:
        document = json.loads(comment)
        document["scail2_rt"] |= changes
        return json.dumps(document)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda comment: "my holidays", "holds no settings of scail2-rt"),
        (lambda comment: "[" * 9000, "holds no settings of scail2-rt"),
        (_with(format=2), "have format 2, and this version of scail2-rt reads format 1"),
        (_with(options=[1]), "are damaged"),
        (_with(options={"steps": "many"}, inputs={}), "'many' is not a valid integer"),
        (_with(options={"prompt_file": "/etc/hostname"}), "prompt_file, which this version of scail2-rt does not know"),
        (_with(inputs={"image": {"name": "../ref.png", "sha256": None}}), "is neither beside it"),
    ],
)
def test_settings_that_cannot_be_used(
    scail2: Run, engines: Path, made: dict[str, Path], tmp_path: Path, change: Callable[[str], str], says: str
) -> None:
    video = retagged(made["a.mp4"], tmp_path / "edited.mp4", change)
    message = error_of(scail2("generate", engines, "--from-video", video, "-o", tmp_path / "b.mp4"))
    assert says in message
    assert {path.name for path in tmp_path.iterdir()} == {"edited.mp4"}


def test_other_engines_are_told(scail2: Run, engines: Path, made: dict[str, Path], tmp_path: Path) -> None:
    video = retagged(made["a.mp4"], tmp_path / "edited.mp4", _with(engines={"digest": "0" * 64, "precision": "fp8"}))
    shutil.copyfile(made["a.mp4"].with_suffix(".json"), tmp_path / "edited.json")
    words = ("generate", engines, "-o", tmp_path / "b.mp4", "--frames", "5", "--overwrite", "--from-video", video)
    assert "was made with another engine folder (fp8, digest 000000000000;" in scail2(*words).stderr
    shutil.copyfile(made["a.mp4"], video)
    other = retagged(made["a.mp4"], video.with_name("other.mp4"), _with(made_with={"device": "GPU", "av": "1"}))
    shutil.copyfile(made["a.mp4"].with_suffix(".json"), tmp_path / "other.json")
    assert "the result may not be bit-identical" in scail2(*words[:-1], other).stderr


def test_a_run_of_image_folders_is_repeated(scail2: Run, engines: Path, case: Path, tmp_path: Path) -> None:
    """The folders are found again, and are known when they are given."""
    for name, video in {"clip": "rendered_v2.mp4", "mask": "rendered_mask_v2.mp4"}.items():
        (tmp_path / name).mkdir()
        for number, pixels in enumerate(read_video(case / video).pixels[:5]):
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    folders = ("--driving", tmp_path / "clip", "--mask-video", tmp_path / "mask")
    words = ("generate", engines, "--image", case / "ref.png", "--mask-image", case / "ref_mask.png", *folders)
    assert scail2(*words, "-o", tmp_path / "a.mp4", *OPTIONS, "--fps", "12").returncode == 0
    for name, given in {"b.mp4": (), "c.mp4": folders}.items():
        result = scail2("generate", engines, "--from-video", tmp_path / "a.mp4", "-o", tmp_path / name, *given)
        assert result.returncode == 0, result.stderr
        assert "warning" not in result.stderr
        assert file_hash(tmp_path / name) == file_hash(tmp_path / "a.mp4")


def test_a_configuration_file_leaves_no_trace_and_gives_way_to_the_settings(
    scail2: Run, engines: Path, case: Path, made: dict[str, Path], tmp_path: Path
) -> None:
    """Its path is not stored, and an equal run with it is resumed without it. What a video tells replaces what it says
    about inputs and sampling; where to write to is still read from it."""
    config = tmp_path / "my.toml"
    config.write_text(f'case = "{case}"\nseed = 3\nprompt = "a man walks"\noutput = "a.mp4"\n')
    assert scail2("generate", engines, "--config", config, *SMALL).returncode == 0
    assert "config" not in stored(tmp_path / "a.mp4")["options"]  # type: ignore[operator]
    assert file_hash(tmp_path / "a.mp4") == file_hash(made["a.mp4"])
    resumed = scail2("generate", engines, "--case", case, "-o", tmp_path / "a.mp4", *OPTIONS, "--resume")
    assert "nothing to resume" in resumed.stderr
    (tmp_path / "p.txt").write_text("other")
    config.write_text(f'case = "{case}"\nprompt-file = "p.txt"\nseeds = "7,8"\nsteps = 9\noutput = "b.mp4"\n')
    result = scail2("generate", engines, "--config", config, "--from-video", made["a.mp4"])
    assert result.returncode == 0, result.stderr
    assert file_hash(tmp_path / "b.mp4") == file_hash(made["a.mp4"])
