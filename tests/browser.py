"""A headless Chromium that a test tells what to do, through its DevTools protocol on a pair of pipes."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")
READS, WRITES = 3, 4
"""Descriptors that Chromium talks on."""


class Tab:
    """One tab.

    Attributes:
        complaints: errors and warnings of the console, and of scripts.
        loaded: addresses that were asked for.
    """

    def __init__(self, commands: int, answers: int) -> None:
        self.complaints: list[str] = []
        self.loaded: list[str] = []
        self._commands, self._answers, self._buffer = commands, answers, b""
        self._numbers = itertools.count(1)
        self._session: str | None = None
        target = self._tell("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._tell(f"{domain}.enable")

    def show(self, page: Path, width: int, scheme: str) -> None:
        """Load a page on a screen of this width, with a preference for `light` or `dark`."""
        self._tell(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        self._tell("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._tell("Page.navigate", url=page.as_uri())
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page, of a promise what it comes to."""
        answer = self._tell("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        return answer["result"].get("value")

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        return base64.b64decode(self._tell("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def close(self) -> None:
        """End the browser."""
        self._session = None
        self._tell("Browser.close")

    def _tell(self, method: str, **parameters: Any) -> dict[str, Any]:
        command = {"id": next(self._numbers), "method": method, "params": parameters}
        command |= {"sessionId": self._session} if self._session else {}
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while (message := self._receive()).get("id") != command["id"]:
            pass
        assert "error" not in message, message
        return message["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            received = os.read(self._answers, 2**20)
            assert received, "Chromium has ended"
            self._buffer += received
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        self._note(message.get("method"), message.get("params"))
        return message

    def _note(self, method: str | None, event: Any) -> None:
        if method == "Network.requestWillBeSent":
            self.loaded.append(event["request"]["url"])
        elif method == "Log.entryAdded" and event["entry"]["level"] in ("error", "warning"):
            self.complaints.append(event["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(event["exceptionDetails"]["text"])
        elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(event["args"]))


@contextmanager
def tab(profile: Path) -> Iterator[Tab]:
    """A tab of a Chromium of its own.

    Args:
        profile: folder for what Chromium writes.
    """
    assert CHROMIUM is not None
    their_input, our_output = os.pipe()
    our_input, their_output = os.pipe()

    def connect() -> None:
        # First out of the way of the descriptors that Chromium wants.
        high = [os.dup2(their_input, 100), os.dup2(their_output, 101)]
        os.dup2(high[0], READS)
        os.dup2(high[1], WRITES)

    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        command, preexec_fn=connect, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(their_input)
    os.close(their_output)
    try:
        opened = Tab(our_output, our_input)
        yield opened
        opened.close()
        process.wait(30)
    finally:
        process.kill()
        process.wait()
        os.close(our_output)
        os.close(our_input)
