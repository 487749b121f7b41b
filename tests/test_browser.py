"""The viewer's page in a headless Chromium, beside a training that goes on."""

from __future__ import annotations

import io
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import masked_wavelet_codec as codec
from masked_wavelet_nerf.loading import Camera, LoadedScene

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.common.exceptions import WebDriverException  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="needs chromium and chromedriver (Debian: apt-get install chromium-driver)",
)
PATIENCE = 180.0
"""Seconds: two cores train, render and draw the page at once."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(what: str, found: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if result := found():
            return result
        time.sleep(0.2)
    raise AssertionError(f"{what}: not within {PATIENCE:.0f} s")


def is_served(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def process(tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a command that listens; it is stopped in the end."""
    started: list[subprocess.Popen] = []

    def start(*command: object) -> subprocess.Popen:
        with (tmp_path / f"log_{len(started)}").open("w") as log:
            words = [str(word) for word in command]
            started.append(subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT))
        return started[-1]

    yield start
    for running in started:
        if running.poll() is None:
            running.kill()
            running.wait()


@pytest.fixture
def browser(tmp_path) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for word in (
        "headless",
        "no-sandbox",
        "use-gl=angle",
        "use-angle=swiftshader",
        "enable-unsafe-swiftshader",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "disable-dev-shm-usage",
        f"user-data-dir={tmp_path / 'profile'}",
        "window-size=800,480",
    ):
        options.add_argument(f"--{word}")
    try:
        driver = webdriver.Chrome(service=webdriver.ChromeService(DRIVER), options=options)
    except WebDriverException as error:
        pytest.skip(f"chromium does not start here: {error.msg}")
    yield driver
    driver.save_screenshot(str(tmp_path / "page.png"))  # of use where a test fails
    (tmp_path / "page.txt").write_text(driver.find_element(By.TAG_NAME, "body").text)
    driver.quit()


class Page:
    """nerfstudio's viewer as a person sees it."""

    def __init__(self, browser: Any, port: int) -> None:
        self.browser = browser
        browser.get(f"http://127.0.0.1:{port}")
        wait_for("the panel", lambda: self.buttons("Write scene.mwnf"))

    def buttons(self, label: str) -> list:
        path = f"//button[contains(normalize-space(.), '{label}')]"
        return [b for b in self.browser.find_elements(By.XPATH, path) if b.is_displayed()]

    def press(self, label: str) -> None:
        (button,) = self.buttons(label)
        button.click()

    def text(self) -> str:
        return self.browser.find_element(By.TAG_NAME, "body").text

    def number(self, pattern: str) -> int:
        found = re.search(pattern, self.text())
        return int(found[1].replace(",", "")) if found else -1

    def enter(self, label: str, value: object) -> None:
        """Types into the number beside a slider, slowly: each digit changes the value."""
        path = f"//label[normalize-space(.)='{label}']/following::input[@type='text'][1]"
        field = self.browser.find_element(By.XPATH, path)
        field.send_keys(Keys.CONTROL, "a")
        for digit in str(value):
            field.send_keys(digit)
            time.sleep(1)
        field.send_keys(Keys.ENTER)

    def picture(self, width: int, height: int) -> np.ndarray:
        """(height, width, 3) in [0, 1]: the canvas, without the gizmo of axes at its lower left."""
        canvas = min(
            self.browser.find_elements(By.TAG_NAME, "canvas"), key=lambda c: c.rect["width"]
        )
        page = Image.open(io.BytesIO(self.browser.get_screenshot_as_png())).convert("RGB")
        x, y, w, h = (canvas.rect[name] for name in ("x", "y", "width", "height"))
        shown = page.crop((round(x), round(y), round(x + w), round(y + h)))
        return np.asarray(shown.resize((width, height), Image.Resampling.BOX)) / 255


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Of all but the corner with the gizmo."""
    keep = np.ones(one.shape[:2], bool)
    keep[-one.shape[0] // 4 :, : one.shape[1] // 6] = False
    return -10 * math.log10(float(np.square(one - other)[keep].mean()))


def as_the_page_starts(scene: LoadedScene, width: int, height: int) -> np.ndarray:
    """The render, in Python, of what a client sees first: the middle training camera's view."""
    stored = scene.cameras[:8]
    positions = torch.stack([camera.camera_to_world[:, 3] for camera in stored])
    start = stored[int((positions - positions.mean(dim=0)).norm(dim=-1).argmin())]
    focal = start.fy * height / start.height
    camera = Camera(start.camera_to_world, focal, focal, width / 2, height / 2, width, height)
    return scene.render(camera)[0].numpy()


def test_the_page_beside_a_training(capture, tmp_path, process, browser):
    """The scene appears, the export button writes it while training goes on, sliders change it."""
    port, program = free_port(), Path(sys.executable).with_name("ns-train")
    flags = {
        "output-dir": tmp_path / "runs",
        "timestamp": "0",
        "experiment-name": "run",
        "max-num-iterations": 1_000_000,
        "machine.device-type": "cpu",
        "viewer.websocket-port": port,
        "viewer.websocket-host": "127.0.0.1",
        "viewer.image-format": "png",
        "pipeline.datamanager.train-num-rays-per-batch": 256,
        "pipeline.model.initial-resolution": 24,
        "pipeline.model.final-resolution": 24,
        "pipeline.model.levels": 2,
        "pipeline.model.hidden-dim": 16,
        "pipeline.model.density-shift": -3.0,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    training = process(program, "masked-wavelet-bounded", *words, "--data", capture)
    wait_for("the viewer", lambda: is_served(port))
    page = Page(browser, port)

    def step() -> int:
        printed = re.findall(r"^(\d+) \(", (tmp_path / "log_0").read_text(), re.MULTILINE)
        return int(printed[-1]) if printed else 0

    wait_for("some training", lambda: step() > 300)
    page.press("Write scene.mwnf")
    path = tmp_path / "runs" / "run" / "masked-wavelet-bounded" / "0" / "scene.mwnf"
    wait_for("an export", lambda: "scene.mwnf written, " in page.text())
    assert f"scene.mwnf written, {path.stat().st_size:,} bytes" in page.text()
    first = codec.read(path)
    before = step()
    wait_for("more training", lambda: step() > before)
    assert training.poll() is None

    # Standing still, it can be compared.
    page.press("Pause Training")
    page.press("Hide Train Cams")
    page.enter("Max res", 128)
    path.unlink()
    page.press("Write scene.mwnf")
    wait_for("an export", lambda: path.exists())
    assert codec.read(path).meta["step"] > first.meta["step"]
    wait_for("a still picture", lambda: "Resolution: 128x" in page.text().replace("×", "x"))
    width, height = 128, page.number(r"Resolution: 128.(\d+)")
    scene = LoadedScene(codec.read(path))
    expected = as_the_page_starts(scene, width, height)
    wait_for("the scene", lambda: psnr(page.picture(width, height), expected) > 30)
    size = page.number(r"File: some ([\d,]+) bytes")
    assert abs(size - path.stat().st_size) < 0.25 * size  # an estimate
    kept = re.search(r"Kept: ([\d.]+)%", page.text())
    described = codec.describe(path.read_bytes())  # without what is kept, but zero
    share = 100 * described.num_kept / described.num_coefficients
    assert kept and share - 0.01 < float(kept[1]) < share + 4

    # A slider changes the picture: the coarsest level alone, which is what its bytes decode to.
    coarse = as_the_page_starts(LoadedScene(codec.read(path, levels=0)), width, height)
    assert psnr(coarse, expected) < 28
    page.enter("Levels shown", 0)
    wait_for("a coarser scene", lambda: psnr(page.picture(width, height), coarse) > 30)
    training.terminate()
    assert training.wait(timeout=PATIENCE) == 128 + signal.SIGTERM


def test_view_leaves_nothing_behind(capture, tmp_path, process, tiny_config, start, monkeypatch):
    """From a file to a page, and back to the file alone."""
    from masked_wavelet_nerf.run_scene import scene_of

    trainer = start(tiny_config())
    scene = scene_of(trainer.config, trainer.pipeline.model, trainer.pipeline, 0, {})
    port, folder = free_port(), tmp_path / "temporary"
    folder.mkdir()
    codec.write(tmp_path / "scene.mwnf", scene)
    monkeypatch.setenv("TMPDIR", str(folder))
    program = Path(sys.executable).with_name("mwnerf")
    words = "view", tmp_path / "scene.mwnf", "--port", port, "--no-open-browser"
    viewing = process(program, *words)
    wait_for("the viewer", lambda: is_served(port))
    with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=60) as page:
        assert b"<html" in page.read().lower()
    assert any(folder.glob("mwnerf-view-*/config.yml"))
    viewing.terminate()
    assert viewing.wait(timeout=PATIENCE) == 128 + signal.SIGTERM
    assert not any(folder.glob("mwnerf-view-*"))
