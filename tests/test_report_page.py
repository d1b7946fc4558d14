"""The report in a real browser: nothing fails, charts answer the pointer, clips play, it fits a phone and prints."""

import asyncio
import json
from base64 import b64decode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import PROGRAM, Page, open_page
from test_report import SPEAKERS, record_run

from cel_dist.data.audio import encode_audio
from cel_dist.report import write_report

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium; install the package chromium")


def record_run_with_audio(folder: Path) -> Path:
    """A run with a hostile name, whose validation audio is at hand."""
    run = folder / "run <b>&amp;"
    run.mkdir()
    record_run(run)
    root = folder / "audio"
    generator = np.random.default_rng(0)
    for speaker in SPEAKERS:
        (root / speaker).mkdir(parents=True)
        for number in range(4):
            noise = (3000 * generator.standard_normal(80_000)).astype(np.int16)
            (root / speaker / f"{number}.flac").write_bytes(encode_audio(noise, "flac"))
    (run / "config.yaml").write_text(json.dumps({"eval": {"root": str(root)}}))
    return run


async def look(page: Page) -> dict[str, Any]:
    """What the page shows in light, dark, on a phone, on paper, under the pointer and when a clip is played."""
    found: dict[str, Any] = {}
    for scheme in ("light", "dark"):
        await page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        found[scheme] = await page.value("getComputedStyle(document.body).backgroundColor")
    map_ = "document.querySelector('svg .symbol').ownerSVGElement"
    x, y = await page.value(
        f"(() => {{ const map = {map_}; map.scrollIntoView({{block: 'center'}});"
        "const [x, y] = JSON.parse(map.dataset.hover)[0];"
        "const at = new DOMPoint(x, y).matrixTransform(map.getScreenCTM()); return [at.x, at.y]; })()"
    )
    # The scrolling hides the words of the pointer, and is told of with the next frame.
    await page.value("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    await page.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    await page.until("!document.getElementById('tip').hidden")
    found["tip"] = await page.text("#tip")
    await page.click("button.play")
    clip = "document.getElementById('clip-' + document.querySelector('button.play').dataset.clip)"
    await page.until(f"{clip}.duration > 0")
    found["seconds"] = await page.value(f"{clip}.duration")
    await page.send("Emulation.setDeviceMetricsOverride", width=375, height=800, deviceScaleFactor=1, mobile=True)
    found["width"] = await page.value("document.documentElement.scrollWidth")
    found["heading"] = await page.text("h1")
    found["paper"] = b64decode((await page.send("Page.printToPDF"))["data"])
    found["complaints"] = page.complaints
    found["requested"] = page.requested
    return found


def test_the_page_in_a_browser(tmp_path: Path) -> None:
    report = write_report(record_run_with_audio(tmp_path))

    async def visit() -> dict[str, Any]:
        async with open_page(report.as_uri(), tmp_path, Path("/dev/null")) as page:
            return await look(page)

    found = asyncio.run(visit())
    assert found["complaints"] == []
    assert [address for address in found["requested"] if not address.startswith(("file:", "data:"))] == []
    assert found["light"] != found["dark"]
    assert found["tip"].split("\n") == ["anna/0.flac", "speaker anna"]
    # MP3 has a frame or two more than what went in.
    assert 3.4 < found["seconds"] < 3.8
    assert found["width"] <= 375
    assert found["heading"] == "run <b>&amp;"
    assert found["paper"].startswith(b"%PDF")
    assert found["paper"].count(b"/Type /Page\n") >= 2


def test_without_audio_there_is_nothing_to_play(tmp_path: Path) -> None:
    run = record_run_with_audio(tmp_path)
    out = tmp_path / "quiet.html"
    assert "<audio" not in write_report(run, out, audio=False).read_text()
    assert not (run / "report.html").exists()
    assert "<audio" in write_report(run, out).read_text()
