"""`cel report` as it is called: what it prints, unfinished and large runs, and comparisons in a real browser."""

import asyncio
import json
import subprocess
import sys
from base64 import b64decode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import PROGRAM, open_page
from test_report import Page, record_run
from test_report_page import record_run_with_audio
from training_runs import CEL, ENVIRONMENT, write_config

needs_browser = pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium; install the package chromium")
# Markup, an attribute's end, a script's end, text from right to left, a picture character, and no place to break.
HOSTILE = ["<script>alert(1)</script>", "\"onload='x'", "</script><b>", "صوت", "🎙" * 9, "x" * 180]


def report(*arguments: Path | str) -> subprocess.CompletedProcess[str]:
    command = [*CEL, "report", *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def run_called(folder: Path, rate: str = "0.001") -> Path:
    folder.mkdir()
    record_run(folder)
    (folder / "config.yaml").write_text(f"optim:\n  lr: {rate}\n")
    return folder


def test_one_report_and_a_comparison_are_told_as_json(tmp_path: Path) -> None:
    runs = [run_called(tmp_path / name) for name in ("one", "two", "three")]
    done = report(runs[0], "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    page = runs[0] / "report.html"
    assert told == {"report": str(page), "runs": [str(runs[0])], "bytes": page.stat().st_size}
    out = tmp_path / "all.html"
    done = report(*runs, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"wrote {out} (")
    for name in ("one", "two", "three"):
        assert f" {name} " in Page(out).text
    assert not (runs[1] / "report.html").exists()


def test_a_run_that_is_on_its_way_has_a_report(tmp_path: Path) -> None:
    """Its last line is being written, and nothing was evaluated yet."""
    run = tmp_path / "run"
    run.mkdir()
    whole = [json.dumps({"step": step, "epoch": 0, "loss": 3 - step / 60, "lr": 1e-3}) + "\n" for step in (10, 20, 30)]
    (run / "metrics.jsonl").write_text("".join(whole)[:-9])
    done = report(run)
    assert done.returncode == 0, done.stderr
    page = Page(run / "report.html")
    assert "steps 20 (epoch 0)" in page.text
    # A loss and a learning rate; there is no evaluation to show.
    assert page.figures == 1
    assert "EER" not in page.text


def test_the_training_data_are_described(small_corpus: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    record_run(run)
    write_config(small_corpus, tmp_path, data={"num_speakers": 10}).rename(run / "config.yaml")
    done = report(run)
    assert done.returncode == 0, done.stderr
    found = subprocess.run(
        [*CEL, "data", "stats", small_corpus.shards, "--config", run / "config.yaml", "--json"],
        env=ENVIRONMENT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    counted = json.loads(found.stdout)
    text = Page(run / "report.html").text
    assert counted["sampled"] == 40
    assert "measured 40 utterances, 0 of them unreadable" in text
    assert f"level median {counted['levels']['rms_db'][2]:.1f} dBFS" in text
    assert f"clipping {counted['levels']['clipped']:.1%} of the utterances" in text
    assert f"false negatives {counted['negatives']['pair_rate']:.3%} of the pairs" in text
    assert counted["advice"]
    for advice in counted["advice"]:
        assert f"worth acting on {advice['found']}: {advice['remedy']}" in text


def test_the_trials_of_voxceleb1_fit_into_a_page_and_into_memory(tmp_path: Path) -> None:
    """40 speakers with 4708 utterances and 37 720 trials, as in VoxCeleb1-O."""
    run = run_called(tmp_path / "run")
    generator = np.random.default_rng(0)
    speakers = generator.integers(0, 40, 4708)
    names = [f"id{10270 + speaker}/{number:011x}/00001.wav" for number, speaker in enumerate(speakers)]
    embeddings = generator.standard_normal((40, 512))[speakers] + generator.standard_normal((4708, 512))
    np.savez(run / "evaluation" / "embeddings.npz", names=np.array(names), embeddings=embeddings.astype(np.float32))
    with (run / "evaluation" / "scores.txt").open("w") as file:
        for one in generator.permutation(np.repeat(np.arange(4708), 9))[:37_720]:
            # Half of them are of one speaker.
            same = generator.random() < 0.5
            other = generator.choice(np.flatnonzero((speakers == speakers[one]) == same))
            score = -np.linalg.norm(embeddings[one] - embeddings[other]) / 32
            file.write(f"{int(same)} {names[one]} {names[other]} {score:.6f}\n")
    program = (
        "import resource, runpy, sys\n"
        "resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))\n"
        f"sys.argv = ['cel', 'report', {str(run)!r}]\n"
        "runpy.run_module('cel_dist', run_name='__main__')\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = run / "report.html"
    assert page.stat().st_size < 8 << 20
    assert "4,708 utterances" in Page(page).text


async def seen(address: str, folder: Path) -> dict[str, Any]:
    """Colours, widths and complaints of a page in light and dark, on a desk, a phone and on paper."""
    found: dict[str, Any] = {"widths": {}, "colours": {}, "tallest": {}}
    async with open_page(address, folder, Path("/dev/null")) as page:
        for scheme in ("light", "dark"):
            await page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            found["colours"][scheme] = await page.value(
                "[getComputedStyle(document.body).backgroundColor, "
                "getComputedStyle(document.querySelector('td')).color]"
            )
            for width in (375, 1280):
                await page.send(
                    "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=True
                )
                await page.value("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
                found["widths"][scheme, width] = await page.value("document.documentElement.scrollWidth")
                found["tallest"][scheme, width] = await page.value(
                    # Of the words themselves: the cell is as high as its row.
                    "Math.max(...[...document.querySelectorAll('th[scope=row]')].map((head) => {"
                    "const words = document.createRange(); words.selectNodeContents(head);"
                    "return words.getBoundingClientRect().height; }))"
                )
                await page.picture(folder / f"{scheme}-{width}.png")
        found["unnamed"] = await page.value(
            "[...document.querySelectorAll('svg, button')].filter((element) => !element.getAttribute('aria-label'))"
            ".map((element) => element.outerHTML.slice(0, 200))"
        )
        found["longest"] = await page.value(
            "Math.max(...[...document.querySelectorAll('svg text')].map((text) => text.getBBox().width / "
            "text.ownerSVGElement.viewBox.baseVal.width))"
        )
        found["text"] = await page.text("body")
        found["paper"] = b64decode((await page.send("Page.printToPDF"))["data"])
        found["questions"] = page.questions
        found["complaints"] = page.complaints
        found["requested"] = page.requested
    return found


def require_sound(found: dict[str, Any]) -> None:
    assert found["complaints"] == found["questions"] == found["unnamed"] == []
    assert [address for address in found["requested"] if not address.startswith(("file:", "data:"))] == []
    assert found["colours"]["light"] != found["colours"]["dark"]
    for colours in found["colours"].values():
        assert colours[0] != colours[1]
    assert {key: width for key, width in found["widths"].items() if width > key[1]} == {}
    # No name is set letter by letter, and none fills a chart.
    assert max(found["tallest"].values()) < 100
    assert found["longest"] < 0.7
    assert found["paper"].startswith(b"%PDF")


@needs_browser
def test_a_comparison_in_a_browser(tmp_path: Path) -> None:
    runs = [run_called(tmp_path / f"{number} {name[:60]}".replace("/", "_")) for number, name in enumerate(HOSTILE)]
    done = report(*runs, "--out", tmp_path / "comparison.html")
    assert done.returncode == 0, done.stderr
    found = asyncio.run(seen((tmp_path / "comparison.html").as_uri(), tmp_path))
    require_sound(found)
    for run in runs:
        assert run.name in found["text"]


@needs_browser
def test_names_are_shown_as_they_are_and_break_nothing(tmp_path: Path) -> None:
    run = record_run_with_audio(tmp_path)
    names = dict(zip(("anna", "bert", "carl"), (HOSTILE[0].replace("/", "_"), HOSTILE[3], HOSTILE[5]), strict=True))
    for file in ("evaluation/scores.txt",):
        text = (run / file).read_text()
        for plain, hostile in names.items():
            text = text.replace(f"{plain}/", f"{hostile}/")
        (run / file).write_text(text)
    for plain, hostile in names.items():
        (tmp_path / "audio" / plain).rename(tmp_path / "audio" / hostile)
    stored = np.load(run / "evaluation" / "embeddings.npz")
    renamed = np.array([f"{names[name.split('/')[0]]}/{name.split('/')[1]}" for name in stored["names"]])
    np.savez(run / "evaluation" / "embeddings.npz", names=renamed, embeddings=stored["embeddings"])
    done = report(run)
    assert done.returncode == 0, done.stderr
    found = asyncio.run(seen((run / "report.html").as_uri(), tmp_path))
    require_sound(found)
    for hostile in names.values():
        assert f"{hostile}/" in found["text"]


@needs_browser
def test_a_trial_is_heard(tmp_path: Path) -> None:
    done = report(run := record_run_with_audio(tmp_path))
    assert done.returncode == 0, done.stderr

    async def listen() -> tuple[float, list[str]]:
        async with open_page((run / "report.html").as_uri(), tmp_path, Path("/dev/null")) as page:
            await page.click("table button.play")
            clip = "document.getElementById('clip-' + document.querySelector('table button.play').dataset.clip)"
            await page.until(f"{clip}.currentTime > 0.2")
            return float(await page.value(f"{clip}.played.end(0)")), page.complaints

    played, complaints = asyncio.run(listen())
    assert played > 0.2
    assert complaints == []
