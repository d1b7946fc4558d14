"""A headless Chromium, driven over its DevTools protocol."""

import asyncio
import contextlib
import json
import shutil
import subprocess
from base64 import b64decode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_SECONDS = 60


class Page:
    """A page of the browser.

    Attributes:
        requested: addresses that it has asked for.
        complaints: errors on its console, uncaught ones among them.
        questions: of its dialogues, all of which are answered with yes.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._replies: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._number = 0
        self.requested: list[str] = []
        self.complaints: list[str] = []
        self.questions: list[str] = []

    async def listen(self) -> None:
        """Take what the browser says until it ends."""
        async for message in self._socket:
            told = json.loads(message.data)
            if "id" in told:
                self._replies.pop(told["id"]).set_result(told)
            elif told["method"] == "Network.requestWillBeSent":
                self.requested.append(told["params"]["request"]["url"])
            elif told["method"] == "Page.javascriptDialogOpening":
                self.questions.append(told["params"]["message"])
                # Not awaited: its reply comes to this loop.
                self._answering = asyncio.ensure_future(self.send("Page.handleJavaScriptDialog", accept=True))
            elif told["method"] == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(told["params"]["exceptionDetails"]))
            elif told["method"] == "Log.entryAdded" and told["params"]["entry"]["level"] == "error":
                self.complaints.append(told["params"]["entry"]["text"])

    async def send(self, method: str, **parameters: Any) -> Any:
        """The result of a command."""
        self._number += 1
        reply = self._replies[self._number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        answer = await asyncio.wait_for(reply, _SECONDS)
        assert "error" not in answer, answer
        return answer["result"]

    async def value(self, expression: str) -> Any:
        """The value of an expression in the page."""
        result = await self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, expression: str) -> None:
        """Wait in the page until an expression holds."""
        await self.value(
            "new Promise((resolve, reject) => { let left = 1000; const look = () => "
            f"({expression}) ? resolve(true) : --left ? setTimeout(look, 50) : "
            "reject(new Error(document.body.innerText)); look(); })"
        )

    async def click(self, selector: str) -> None:
        """Press the mouse on an element, when it is there and can be pressed."""
        element = f"document.querySelector({json.dumps(selector)})"
        await self.value("window.pressed = false")
        for _ in range(20):
            await self.until(f"{element} && !{element}.disabled")
            x, y = await self.value(
                f"(() => {{ const element = {element}; element.scrollIntoView({{block: 'center'}});"
                "element.addEventListener('click', () => { window.pressed = true; }, { capture: true, once: true });"
                "const box = element.getBoundingClientRect();"
                "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
            )
            for kind in ("mousePressed", "mouseReleased"):
                await self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
            if await self.value("window.pressed"):
                return
            # It moved, as after a change of the window's width, between the look and the press.
        raise AssertionError(f"{selector} cannot be pressed")

    async def type(self, selector: str, text: str) -> None:
        """Write into an empty field."""
        await self.click(selector)
        await self.value(f"document.querySelector({json.dumps(selector)}).select()")
        await self.send("Input.insertText", text=text)

    async def choose(self, selector: str, path: Path) -> None:
        """Choose a file."""
        root = (await self.send("DOM.getDocument"))["root"]["nodeId"]
        node = (await self.send("DOM.querySelector", nodeId=root, selector=selector))["nodeId"]
        await self.send("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    async def text(self, selector: str) -> str:
        """What an element shows."""
        return str(await self.value(f"document.querySelector({json.dumps(selector)}).innerText"))

    async def picture(self, path: Path) -> None:
        """Save what the page looks like."""
        shot = await self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(b64decode(shot["data"]))


@contextlib.asynccontextmanager
async def open_page(url: str, folder: Path, microphone: Path) -> AsyncIterator[Page]:
    """A page in a browser of its own, whose microphone gives the content of a WAV again and again."""
    assert PROGRAM is not None
    profile = folder / "profile"
    command = [PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--mute-audio"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--disable-dev-shm-usage", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
    command += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    command += [f"--use-file-for-fake-audio-capture={microphone}", "--window-size=900,900", "about:blank"]
    with (folder / "browser.txt").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        port = await _port(profile / "DevToolsActivePort", process)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                [address] = [page["webSocketDebuggerUrl"] for page in await answer.json() if page["type"] == "page"]
            async with session.ws_connect(address, max_msg_size=1 << 26) as socket:
                page = Page(socket)
                listener = asyncio.create_task(page.listen())
                for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
                    await page.send(f"{domain}.enable")
                await page.send("Page.navigate", url=url)
                await page.until("document.readyState === 'complete' && location.protocol !== 'about:'")
                yield page
                listener.cancel()
    finally:
        process.terminate()
        process.wait(30)


async def _port(file: Path, process: subprocess.Popen[bytes]) -> int:
    for _ in range(20 * _SECONDS):
        if file.exists() and (lines := file.read_text().splitlines()):
            return int(lines[0])
        assert process.poll() is None, "the browser ended"
        # Nothing tells that the file is there.
        await asyncio.sleep(0.05)
    raise AssertionError("the browser does not listen")
