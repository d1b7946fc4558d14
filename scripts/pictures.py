"""The pictures of the documentation, taken anew in a headless Chromium from what `make demo` leaves.

python scripts/pictures.py demo        # docs/pictures/report.png, mlflow.png, service.png
"""

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
PICTURES = CHECKOUT / "docs" / "pictures"
BIN = Path(sys.executable).parent
sys.path.append(str(CHECKOUT / "tests"))

from browser import Page, open_page  # noqa: E402 (the tests are no package)


def main() -> None:
    """Take all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder of a finished 'cel demo'")
    demo = parser.parse_args().demo.resolve()
    PICTURES.mkdir(exist_ok=True)
    [run] = sorted((demo / "runs").iterdir())[-1:]
    asyncio.run(report(run))
    asyncio.run(mlflow(demo, (run / "mlflow_run_id.txt").read_text().strip()))
    asyncio.run(service(demo))


async def report(run: Path) -> None:
    """The top of the report of a run."""
    # By a relative path, which the page shows.
    subprocess.run([BIN / "cel", "report", Path(*run.parts[-3:])], cwd=run.parents[2], check=True)
    with serving([sys.executable, "-m", "http.server", "8331", "--directory", str(run)], "http://127.0.0.1:8331/"):
        await take("http://127.0.0.1:8331/report.html", "report", 1200, 1500)


async def mlflow(demo: Path, run_id: str) -> None:
    """The metrics of a run in MLflow."""
    command = [BIN / "mlflow", "ui", "--backend-store-uri", f"sqlite:///{demo / 'mlflow.db'}", "--port", "8332"]
    with serving(list(map(str, command)), "http://127.0.0.1:8332/health"):
        url = f"http://127.0.0.1:8332/#/experiments/1/runs/{run_id}/model-metrics"
        await take(url, "mlflow", 1300, 900, until="document.querySelectorAll('.main-svg').length > 8")


async def service(demo: Path) -> None:
    """The page of the service, with three people enrolled and a question answered."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {"MLFLOW_TRACKING_URI": f"sqlite:///{demo / 'mlflow.db'}"}
        command = [
            BIN / "cel",
            "serve",
            "--model",
            "models:/cel-demo/1",
            "--store",
            f"{folder}/people.db",
            "--port",
            "8333",
        ]
        with serving(list(map(str, command)), "http://127.0.0.1:8333/health", environment):
            speakers = sorted((demo / "corpus" / "speech").iterdir())[-3:]
            for name, speaker in zip(("Ann", "Bob", "Carol"), speakers, strict=True):
                for recording in sorted(speaker.rglob("*.flac"))[:2]:
                    query = urllib.parse.urlencode({"name": name})
                    request = urllib.request.Request(
                        f"http://127.0.0.1:8333/v1/enrol?{query}", data=recording.read_bytes(), method="POST"
                    )
                    urllib.request.urlopen(request).read()
            unknown = sorted(speakers[1].rglob("*.flac"))[3]

            async def ask(page: Page) -> None:
                await page.choose("#file", unknown)
                await page.click("#identify")
                await page.until("document.querySelector('#result').textContent !== ''")

            await take("http://127.0.0.1:8333/", "service", 820, 830, act=ask)


async def take(url, name, width, height, until="true", act=None) -> None:  # type: ignore[no-untyped-def]
    """A picture of a page, when a condition holds and something was done there."""
    with tempfile.TemporaryDirectory() as folder:
        async with open_page(url, Path(folder), Path(folder) / "silence.wav") as page:
            await page.send(
                "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
            )
            await page.until(until)
            # MLflow's assistant takes a third of the page.
            await page.value("document.querySelector('[aria-label=\"Close\"]')?.click()")
            if act is not None:
                await act(page)
            # Whatever moves has come to rest.
            await asyncio.sleep(2)
            shot = await page.send("Page.captureScreenshot")
            (PICTURES / f"{name}.png").write_bytes(b64decode(shot["data"]))


@contextmanager
def serving(command: list[str], url: str, environment: dict[str, str] | None = None) -> Iterator[None]:
    """A server, from when it answers."""
    process = subprocess.Popen(command, env={**os.environ, **(environment or {})})
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(url).read()
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
