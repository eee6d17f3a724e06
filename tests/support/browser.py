"""A real browser, offline: open a page, run a script in it, and say what it returned and complained of."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

__all__ = ["evaluate", "needed"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needed = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
_FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
_FLAGS += " --disable-component-update --disable-sync --remote-debugging-port=0 --remote-allow-origins=*"


def evaluate(
    page: Path, script: str, folder: Path, *, dark: bool = False, width: int = 1300, height: int = 900
) -> tuple[Any, list[str]]:
    """Open ``page`` and run ``script`` in it.

    Args:
        page: a local file; every other address is unreachable.
        script: body of an async function; what it returns must be plain values.
        folder: for the browser's own files.
        dark: whether the reader prefers dark pages.
        width: of the window, in CSS pixels.
        height: likewise.

    Returns:
        What the script returned, and the errors that it or the page threw.
    """
    assert CHROMIUM is not None
    profile = Path(tempfile.mkdtemp(dir=folder))
    command = [CHROMIUM, *_FLAGS.split(), "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        [*command, "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"HOME": str(folder)},
    )
    try:
        port_file = profile / "DevToolsActivePort"
        for _ in range(600):
            if port_file.exists() and (lines := port_file.read_text().split()):
                break
            assert process.poll() is None, "the browser ended"
            time.sleep(0.1)
        return asyncio.run(_run(int(lines[0]), page, script, dark, width, height))
    finally:
        process.kill()
        process.wait()


async def _run(port: int, page: Path, script: str, dark: bool, width: int, height: int) -> tuple[Any, list[str]]:
    from tornado.httpclient import AsyncHTTPClient
    from tornado.websocket import websocket_connect

    answer = await AsyncHTTPClient().fetch(f"http://127.0.0.1:{port}/json")
    (address,) = [tab["webSocketDebuggerUrl"] for tab in json.loads(answer.body) if tab["type"] == "page"]
    socket = await websocket_connect(address, max_message_size=10**9)
    errors: list[str] = []
    events: list[str] = []
    sent = 0

    async def receive() -> dict[str, Any]:
        text = await asyncio.wait_for(socket.read_message(), 120)
        assert text is not None, "the browser closed the connection"
        message: dict[str, Any] = json.loads(text)
        events.append(message.get("method", ""))
        if message.get("method") == "Runtime.exceptionThrown":
            errors.append(str(message["params"]["exceptionDetails"]))
        return message

    async def call(method: str, **parameters: Any) -> dict[str, Any]:
        nonlocal sent
        sent += 1
        mine = sent
        await socket.write_message(json.dumps({"id": mine, "method": method, "params": parameters}))
        while True:
            message = await receive()
            if message.get("id") == mine:
                result: dict[str, Any] = message.get("result", {})
                return result

    await call("Page.enable")
    await call("Runtime.enable")
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    await call("Emulation.setDeviceMetricsOverride", **size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    await call("Emulation.setEmulatedMedia", features=[scheme])
    events.clear()
    await call("Page.navigate", url=page.resolve().as_uri())
    while "Page.loadEventFired" not in events:
        await receive()
    expression = f"(async () => {{{script}}})()"
    result = await call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
    if "exceptionDetails" in result:
        errors.append(re.sub(r"\s+", " ", str(result["exceptionDetails"])))
    return result.get("result", {}).get("value"), errors
