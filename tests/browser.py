"""A headless Chromium, controlled over its DevTools protocol."""

import base64
import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any
from urllib.request import urlopen

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--no-first-run",
    "--disable-gpu-sandbox",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--mute-audio",
    "--hide-scrollbars",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--remote-debugging-port=0",
)


class Page:
    """A tab."""

    def __init__(self, address: str):
        from websockets.sync.client import connect

        self._socket = connect(address, max_size=None, compression=None)
        self._numbers = count(1)
        self.problems: list[str] = []
        """Console errors, uncaught exceptions and failed requests."""
        self.requests: list[str] = []
        """Requested addresses, without data: and blob:."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=300))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._note(message.get("method"), message.get("params", {}))

    def _note(self, event: str | None, found: dict[str, Any]) -> None:
        if event == "Runtime.consoleAPICalled" and found["type"] in ("error", "assert"):
            self.problems.append(
                " ".join(str(part.get("value", part.get("description"))) for part in found["args"])
            )
        elif event == "Runtime.exceptionThrown":
            details = found["exceptionDetails"]
            self.problems.append(str(details.get("exception", {}).get("description", details["text"])))
        elif event == "Log.entryAdded" and found["entry"]["level"] == "error":
            self.problems.append(f"{found['entry']['text']} {found['entry'].get('url', '')}")
        elif event == "Network.requestWillBeSent" and not found["request"]["url"].startswith(
            ("data:", "blob:")
        ):
            self.requests.append(found["request"]["url"])

    def open(self, url: str) -> None:
        self.command("Page.navigate", url=url)

    def evaluate(self, script: str) -> Any:
        """Returns the value of a JavaScript expression; awaits promises."""
        answer = self.command("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 30) -> Any:
        """Waits until an expression is true."""
        return until(lambda: self.evaluate(script), seconds, script)

    def picture(self) -> bytes:
        """Returns a screenshot, PNG."""
        return base64.b64decode(self.command("Page.captureScreenshot", format="png")["data"])

    def mouse(self, kind: str, x: float, y: float, buttons: int = 0) -> None:
        button = "left" if buttons or kind == "mouseReleased" else "none"
        self.command(
            "Input.dispatchMouseEvent",
            type=kind,
            x=x,
            y=y,
            button=button,
            buttons=buttons,
            clickCount=int(kind != "mouseMoved"),
        )

    def click(self, selector: str) -> None:
        """Clicks the middle of the element that a CSS selector finds."""
        place = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center'});"
            " const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        self.click_at(*place)

    def click_at(self, x: float, y: float) -> None:
        self.mouse("mouseMoved", x, y)
        self.mouse("mousePressed", x, y, 1)
        self.mouse("mouseReleased", x, y)

    def drag(
        self, start: tuple[float, float], end: tuple[float, float], steps: int = 10, pause: float = 0.02
    ) -> None:
        self.mouse("mouseMoved", *start)
        self.mouse("mousePressed", *start, 1)
        for k in range(1, steps + 1):
            self.mouse("mouseMoved", *(a + (b - a) * k / steps for a, b in zip(start, end, strict=True)), 1)
            time.sleep(pause)
        self.mouse("mouseReleased", *end)

    def type(self, text: str) -> None:
        """Types into the focused element."""
        self.command("Input.insertText", text=text)

    def close(self) -> None:
        self._socket.close()


def until(condition: Callable[[], Any], seconds: float = 120, what: str = "") -> Any:
    """Returns the value of `condition` once it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {what}")


@contextlib.contextmanager
def browser(profile: Path, width: int = 1280, height: int = 800) -> Iterator[Callable[[], Page]]:
    """Starts Chromium and yields a function that opens a tab."""
    process = subprocess.Popen(
        [PROGRAM, *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    pages: list[Page] = []
    try:
        note = profile / "DevToolsActivePort"
        until(lambda: note.exists() and len(note.read_text().splitlines()) == 2, 60, "Chromium starts")
        port = note.read_text().splitlines()[0]

        def new() -> Page:
            if pages:
                from urllib.request import Request

                answer = urlopen(Request(f"http://127.0.0.1:{port}/json/new?about:blank", method="PUT"))
                target = json.load(answer)
            else:
                target = next(
                    entry
                    for entry in json.load(urlopen(f"http://127.0.0.1:{port}/json"))
                    if entry["type"] == "page"
                )
            page = Page(target["webSocketDebuggerUrl"])
            page.command(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=height,
                deviceScaleFactor=1,
                mobile=False,
            )
            pages.append(page)
            return page

        yield new
    finally:
        for page in pages:
            page.close()
        process.terminate()
        process.wait(20)
