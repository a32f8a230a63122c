"""The page at / in a real browser: Debian's Chromium, headless."""

import http.server
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.served import Served, serving, wait_for
from tests.support.tiny_segmenters import write_sam2

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)")
pytest_plugins = ["tests.support.runtime_fixtures"]
SHOTS = os.environ.get("SCAIL2_SCREENSHOTS")  # folder for screenshots


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1200, "height": 900}, accept_downloads=True)
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.faults = faults
    yield page
    context.close()


def until(page: Any, true: str) -> None:
    """Wait until an expression is true in the page (playwright's function needs eval, which the page's policy
    forbids)."""
    wait_for(lambda: bool(page.evaluate(true)), 60)


def shot(page: Any, name: str) -> None:
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}.png", full_page=True)


def fill(page: Any, case: Path, prompt: str, steps: int = 2) -> None:
    page.set_input_files("#input_reference", case / "ref.png")
    page.set_input_files("#video_reference", case / "rendered_v2.mp4")
    page.click("#masks summary")
    page.set_input_files("#mask_reference", case / "ref_mask.png")
    page.set_input_files("#video_mask_reference", case / "rendered_mask_v2.mp4")
    page.fill("#prompt", prompt)
    page.select_option("#size", "own")
    page.fill("#own-size", "96x64")
    page.fill("#steps", str(steps))


def test_from_a_photo_and_a_clip_to_a_video(served: Served, case: Path, page: Any, tmp_path: Path) -> None:
    page.goto(served.url)
    page.wait_for_selector("body[data-ready]")
    page.click("#go")
    assert page.inner_text("#said") == "Choose a reference image and a driving clip first."
    fill(page, case, "a man walks")
    shot(page, "filled")
    page.click("#go")
    until(page, "document.querySelector('#videos .status')?.textContent.startsWith('done in')")
    until(page, "document.querySelector('#result-video').videoWidth == 96")
    until(page, "document.querySelector('#result-clip').videoWidth == 96")
    until(page, "document.querySelector('#videos .thumb').naturalWidth > 0")
    shot(page, "done")
    with page.expect_download() as got:
        page.click("#download")
    video_id = page.get_attribute("#videos li", "data-id")
    assert got.value.suggested_filename == f"{video_id}.mp4"
    got.value.save_as(tmp_path / "a.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == served.content(video_id)
    assert page.faults == []

    page.reload()
    page.wait_for_selector(f"#videos li[data-id={video_id}]")
    page.click(f"#videos li[data-id={video_id}] .show")
    until(page, "document.querySelector('#result-video').videoWidth == 96")
    page.click(f"#videos li[data-id={video_id}] .delete")
    page.wait_for_selector(f"#videos li[data-id={video_id}]", state="detached")
    assert served.ask("GET", f"/v1/videos/{video_id}").status == 404
    assert page.faults == []


def test_progress_queue_cancel_and_refusals(served: Served, case: Path, page: Any) -> None:
    page.goto(served.url)
    page.wait_for_selector("body[data-ready]")
    fill(page, case, "<b>long</b>", steps=1000)
    page.click("#go")
    first = page.locator("#videos li", has_text="<b>long</b>").first
    first.locator(".status", has_text="step").wait_for(timeout=60_000)
    assert first.locator(".status").inner_text().startswith("segment 1/1, step ")
    page.fill("#prompt", "second")
    page.fill("#steps", "2")
    page.click("#go")
    second = page.locator("#videos li", has_text="second").first
    second.locator(".status", has_text="queued, position 2").wait_for()
    shot(page, "queue")
    first.locator(".delete", has_text="Cancel").click()
    second.locator(".status", has_text="done in").wait_for(timeout=60_000)
    assert page.locator("#videos li", has_text="<b>long</b>").count() == 0
    page.fill("#own-size", "97x64")
    page.click("#go")
    until(page, "document.querySelector('#said').textContent.includes('divisible by 32')")
    shot(page, "refused")


def test_by_keyboard_and_on_a_phone(served: Served, case: Path, browser: Any) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(served.url)
    page.wait_for_selector("body[data-ready]")
    fill(page, case, "by hand")
    assert page.evaluate("document.documentElement.scrollWidth <= 360")
    page.focus("#prompt")
    visited = []
    for _ in range(12):
        page.keyboard.press("Tab")
        visited.append(page.evaluate("document.activeElement.id"))
        if visited[-1] == "go":
            break
    assert visited == ["preset", "size", "own-size", "mode", "seed", "steps", "frames", "go"]
    page.keyboard.press("Enter")
    page.locator("#videos li", has_text="by hand").locator(".status", has_text="done in").wait_for(timeout=60_000)
    until(page, "document.querySelector('#result-video').videoWidth == 96")
    assert page.evaluate("document.documentElement.scrollWidth <= 360")
    assert page.evaluate(
        "[...document.querySelectorAll('input, select, textarea, button')].every(e => e.hidden || e.labels?.length "
        "|| e.textContent.trim() || e.closest('[hidden]'))"
    )
    shot(page, "phone")
    context.close()


def test_keys_on_the_page_and_its_documentation(engines: Path, cache: Path, tmp_path: Path, page: Any) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-key-for-the-page-0001\n")
    with serving(engines, tmp_path / "data", cache, "--api-key-file", str(keys), measured=True) as own:
        page.goto(own.url)
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        until(page, "!document.querySelector('#key-form').hidden")
        page.fill("#key", "a-key-for-the-page-0001")
        page.keyboard.press("Enter")
        page.wait_for_selector("body[data-ready]")
        page.goto(f"{own.url}/docs")
        page.wait_for_selector("body[data-ready]")
        text = page.inner_text("body")
        for said in ("POST /v1/videos/sync", "video_mask_reference", "Denoising steps per segment."):
            assert said in text
        shot(page, "docs")


def test_a_page_of_another_origin_reaches_nothing(served: Served, page: Any, tmp_path: Path) -> None:
    """Fetches, forms and images that a foreign page makes its visitor's browser send to the service."""

    class Elsewhere(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            form = f"<form method=post enctype=multipart/form-data action='{served.url}/v1/files'>"
            self.wfile.write(f"{form}<input name=file value=x></form><img src='{served.url}/v1/videos'>".encode())

        def log_message(self, *_: Any) -> None:
            pass

    before = served.ask("GET", "/v1/files").json
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    answers: dict[str, int] = {}
    page.on("response", lambda answer: answers.__setitem__(f"{answer.request.method} {answer.url}", answer.status))
    try:
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        for options in ("{}", "{mode: 'no-cors'}", "{method: 'POST', mode: 'no-cors', body: new FormData()}"):
            said = page.evaluate(
                f"fetch('{served.url}/v1/videos', {options}).then(a => a.text()).catch(() => 'refused')"
            )
            assert said in ("refused", "")
        page.evaluate("document.querySelector('form').submit()")
        page.wait_for_url(f"{served.url}/**")
        assert "origin_not_allowed" in page.content()
    finally:
        server.shutdown()
        server.server_close()
    ours = {call: status for call, status in answers.items() if served.url in call and "favicon" not in call}
    assert ours
    assert set(ours.values()) == {403}
    assert served.ask("GET", "/v1/files").json == before


def test_masks_on_the_page(engines: Path, case: Path, cache: Path, tmp_path: Path, page: Any) -> None:
    """Masks are made, shown over image and clip, corrected by clicks, and used."""
    sam2 = write_sam2(tmp_path / "sam2", image=64)
    with serving(engines, tmp_path / "data", cache, "--segmenter-weights", str(sam2), measured=True) as own:
        page.goto(own.url)
        page.wait_for_selector("body[data-ready]")
        page.set_input_files("#input_reference", case / "ref.png")
        page.set_input_files("#video_reference", case / "rendered_v2.mp4")
        page.click("#masks summary")
        page.click("#make-masks")
        until(page, "document.querySelector('#mask-state').textContent.includes('Grounding DINO')")
        page.click("#photo", position={"x": 200, "y": 150})
        until(page, "document.querySelector('#clip').videoWidth == 96")
        page.click("#clip", position={"x": 200, "y": 150})
        clicks = page.input_value("#points")
        assert clicks.startswith("image:")
        assert "; 0:" in clicks
        assert page.evaluate("document.querySelector('#clip').paused")
        page.click("#make-masks")
        until(page, "document.querySelector('#mask-state').textContent.startsWith('Masks for')")
        until(page, "document.querySelector('#photo-mask').naturalWidth == 96")
        until(page, "document.querySelector('#clip-mask').videoWidth == 96")
        shot(page, "masks")
        page.select_option("#size", "own")
        page.fill("#own-size", "96x64")
        page.fill("#steps", "2")
        page.click("#go")
        page.locator("#videos .status", has_text="done in").wait_for(timeout=60_000)
