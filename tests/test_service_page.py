"""The page of `cel serve` in a real browser, whose microphone is a file."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from browser import PROGRAM, Page, open_page
from service import Service, small_model, speech, wav

ANN = "Ann <b>&" + "n" * 90


def write_microphone(path: Path, wave: np.ndarray) -> Path:
    """48 kHz, which devices have."""
    soundfile.write(path, soxr.resample(wave.astype(np.float32) / 32768, 16_000, 48_000), 48_000, subtype="PCM_16")
    return path


async def watch_microphones(page: Page) -> None:
    await page.value(
        "(() => { const devices = navigator.mediaDevices, open = devices.getUserMedia.bind(devices);"
        "window.opened = []; devices.getUserMedia = async (wanted) => {"
        "const stream = await open(wanted); opened.push(...stream.getTracks()); return stream; }; })()"
    )


async def record(page: Page) -> None:
    # By somebody who is impatient: the second click comes before the microphone is there.
    await page.until("!document.querySelector('#record').disabled")
    await page.value("document.querySelector('#record').click(); document.querySelector('#record').click()")
    await page.until("document.querySelector('#record').textContent === 'Stop'")
    await page.until("parseFloat(document.querySelector('#timer').textContent) >= 2.5")
    await page.click("#record")
    await page.until("document.querySelector('#record').textContent === 'Record'")


async def ask(page: Page, button: str) -> str:
    await page.value("document.querySelector('#result').textContent = ''")
    await page.click(button)
    await page.until("document.querySelector('#result').textContent !== ''")
    return await page.text("#result")


async def visit(service: Service, folder: Path, microphone: Path, other: Path) -> tuple[Page, dict[str, Any]]:
    """What the page says to somebody who records themself and then has the file of somebody else."""
    said = {}
    async with open_page(service.url, folder, microphone) as page:
        await page.until("!document.querySelector('#access').hidden")
        said["refused"] = await page.text("#result")
        await page.type("#token", "s3cret")
        await page.click("#access button")
        await page.until("document.querySelector('#access').hidden")
        # The refusal of the first request is on the console, and belongs there.
        page.complaints.clear()

        await watch_microphones(page)
        await record(page)
        await page.type("#name", ANN)
        said["enrolled"] = await ask(page, "#enrol")
        await page.until("document.querySelector('#people tbody').children.length === 1")
        said["table"] = await page.text("#people tbody")
        await record(page)
        said["same"] = await ask(page, "#verify")
        said["colour"] = await page.value("document.querySelector('#result').className")
        said["first"] = await ask(page, "#identify")
        await page.choose("#file", other)
        said["other"] = await ask(page, "#verify")
        said["nobody"] = await ask(page, "#identify")
        said["microphones"] = await page.value("opened.map((track) => track.readyState).join()")
        await page.send("Emulation.setDeviceMetricsOverride", width=375, height=800, deviceScaleFactor=1, mobile=True)
        said["width"] = await page.value("document.documentElement.scrollWidth")
        await page.picture(folder / "page.png")
        await page.send("Emulation.clearDeviceMetricsOverride")
        said["removed"] = await ask(page, "#people button")
        await page.until("document.querySelector('#people tbody').children.length === 0")
    return page, said


@pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium; install the package chromium")
def test_people_enrol_by_microphone_and_are_told_apart_in_a_browser(tmp_path: Path) -> None:
    model = small_model()
    calibration = model.description.calibration
    assert calibration is not None
    # Two recordings of Ann score about -0.02, and one of them with the file of Bob -0.14.
    model = model.calibrate(-0.07, calibration)
    service = Service(tmp_path / "service", "--token", "s3cret", model=model)
    other = tmp_path / "bob.wav"
    other.write_bytes(wav(3, 4.0))
    microphone = write_microphone(tmp_path / "ann.wav", speech(0, 4.0))
    try:
        page, said = asyncio.run(visit(service, tmp_path, microphone, other))
        assert "the token is missing or wrong" in said["refused"]
        assert said["enrolled"].startswith(f"{ANN} is enrolled: 1 recording, ")
        assert said["table"].split("\t")[:2] == [ANN, "1"]
        assert said["same"].startswith(f"This is {ANN}: score -0.")
        assert said["colour"] == "good"
        assert said["first"].startswith(f"{ANN}.\n1. {ANN}: score -0.")
        assert said["other"].startswith(f"This is not {ANN}: score -")
        assert said["nobody"].startswith("Nobody of these:\n1. ")
        assert said["microphones"] == "ended,ended"
        # On a telephone, nothing is wider than the screen.
        assert said["width"] == 375
        assert page.questions == [f"Remove {ANN} and all embeddings of this person?"]
        assert said["removed"] == f"{ANN} is removed."
        # All that the page is made of comes from the service, and nothing of it is blocked or fails.
        assert page.complaints == []
        assert [url for url in page.requested if not url.startswith((service.url, "data:", "blob:"))] == []
        assert (tmp_path / "page.png").stat().st_size > 10_000
    finally:
        service.close()
