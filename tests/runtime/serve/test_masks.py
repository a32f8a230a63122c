"""Masks that the service makes: alone, before a video, from the command line, and on the page."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scail2_rt.runtime.serve.wire import Wire
from tests.support.command import SMALL as SMALL_WORDS
from tests.support.command import Run, error_of, read_video
from tests.support.served import INPUTS, SMALL, Served, serving
from tests.support.tiny_segmenters import write_grounding_dino, write_sam2

pytest_plugins = ["tests.support.runtime_fixtures"]
BOXES = ["image:20,5,80,60", "20,5,80,60"]
MASKS = ("mask_reference", "video_mask_reference")


@pytest.fixture(scope="module")
def sam2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_sam2(tmp_path_factory.mktemp("sam2"), image=64)
    write_grounding_dino(folder / "detector")
    return folder


@pytest.fixture(scope="module")
def masking(engines: Path, cache: Path, sam2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    data = tmp_path_factory.mktemp("masking") / "data"
    with serving(engines, data, cache, "--segmenter-weights", str(sam2), measured=True) as own:
        yield own


@pytest.fixture(scope="module")
def photo(masking: Served, case: Path) -> dict[str, Any]:
    """A request with a reference image, a driving clip and no masks."""
    names = ("input_reference", "video_reference")
    kept = {name: {"file_id": masking.upload(case / INPUTS[name])} for name in names}
    return {**kept, **SMALL, "prompt": "a man"}


def test_masks_alone_then_their_video_and_the_same_in_one_request(masking: Served, photo: dict[str, Any]) -> None:
    made = masking.ask("POST", "/v1/masks", {**photo, "boxes": BOXES})
    assert made.status == 200, made.body
    masks_id = made.json["id"]
    told = list(Wire(masking.url, None).events(f"/v1/masks/{masks_id}/events"))
    assert told[-1][0] == "completed"
    assert (told[-1][1]["object"], told[-1][1]["characters"]) == ("masks", ["blue"])
    pictures = [masking.ask("GET", f"/v1/masks/{masks_id}/content?variant={name}").body for name in MASKS]
    assert pictures[0].startswith(b"\x89PNG")
    assert masking.ask("GET", f"/v1/masks/{masks_id}/content?variant=mask_sheet").body.startswith(b"\x89PNG")
    assert masking.ask("GET", f"/v1/masks/{masks_id}/content").status == 404
    assert masks_id not in {video["id"] for video in masking.ask("GET", "/v1/videos").json["data"]}
    first = masking.done(masking.post({**photo, "masks_id": masks_id})["id"])
    assert masking.ask("DELETE", f"/v1/masks/{masks_id}").status == 200
    second = masking.done(masking.post({**photo, "boxes": BOXES})["id"])
    assert [masking.content(second["id"], name) for name in MASKS] == pictures
    assert masking.content(first["id"]) == masking.content(second["id"])
    assert masking.ask("POST", "/v1/videos", {**photo, "masks_id": masks_id}).status == 404


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"points": ["900,900"]}, ("--point", "900,900")),
        ({"boxes": "nonsense"}, ("--box", "nonsense")),
        ({"pairs": "1=1,1=2"}, ("--pairs", "1=1,1=2")),
        ({"max_characters": 0}, ("--max-characters", "0")),
        ({"start": 40}, ("--start", "40")),
    ],
)
def test_what_cannot_be_is_said_in_the_command_lines_words(
    masking: Served, photo: dict[str, Any], scail2: Run, engines: Path, case: Path, sam2: Path, tmp_path: Path,
    change: Any, words: Any,
) -> None:  # fmt: skip
    files = ("--image", case / "ref.png", "--driving", case / "rendered_v2.mp4", "--segmenter-weights", sam2)
    told = error_of(scail2("generate", engines, *files, *SMALL_WORDS, *words, "-o", tmp_path / "a.mp4"))
    answer = masking.ask("POST", "/v1/videos", {**photo, **change})
    assert (answer.status, answer.error) == (400, told)
    one = masking.ask("POST", "/v1/videos", {**photo, "mask_reference": photo["input_reference"]})
    assert (one.status, one.json["error"]["param"]) == (400, "video_mask_reference")
    assert masking.ask("POST", "/v1/videos", {**photo, "segmenter_weights": "/etc"}).status == 400


def test_the_command_line_leaves_the_files_of_a_local_run(
    masking: Served, scail2: Run, engines: Path, case: Path, sam2: Path, tmp_path: Path
) -> None:
    boxes = [word for box in BOXES for word in ("--box", box)]
    words = ("--image", case / "ref.png", "--driving", case / "rendered_v2.mp4", *boxes, *SMALL_WORDS, "--no-metadata")
    local = scail2("generate", engines, *words, "--segmenter-weights", sam2, "-o", tmp_path / "local" / "a.mp4")
    assert local.returncode == 0, local.stderr
    remote = scail2("generate", "--server", masking.url, *words, "-o", tmp_path / "remote" / "a.mp4")
    assert remote.returncode == 0, remote.stderr
    names = [sorted(str(path.relative_to(root)) for path in root.rglob("*"))
             for root in (tmp_path / "local", tmp_path / "remote")]  # fmt: skip
    assert names[0] == names[1]
    videos = [read_video(tmp_path / place / "a.mp4").pixels for place in ("local", "remote")]
    assert (videos[0] == videos[1]).all()  # the settings in the files differ: a service does not know the inputs' names
    for name in ("a.masks/ref_mask.png", "a.masks/rendered_mask_v2.mp4"):
        assert (tmp_path / "local" / name).read_bytes() == (tmp_path / "remote" / name).read_bytes()
    report = (tmp_path / "remote" / "a.json").read_text()
    assert str(tmp_path / "remote" / "a.masks" / "ref_mask.png") in report
    assert str(masking.data) not in report
    refused = scail2("generate", "--server", masking.url, *words, "--segmenter", "sam3", "-o", tmp_path / "b.mp4")
    assert "--segmenter is set by the operator of the service" in error_of(refused)
