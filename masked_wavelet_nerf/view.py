"""``mwnerf view``: from a file to a page in the browser."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import threading
import time
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

import masked_wavelet_codec as codec

_PATIENCE = 120.0
"""Seconds in which the viewer has to be there for its page to be opened."""


@dataclass
class View:
    """Look at a bitstream in nerfstudio's viewer: opens a page in the browser.

    Nothing is left behind when it ends (ctrl+c). On another machine, give --host 0.0.0.0 and open
    its address, or forward the port.
    """

    scene: Annotated[Path, tyro.conf.Positional]
    """The .mwnf file."""
    port: int = 7007
    """Of the page."""
    host: str = "127.0.0.1"
    """Address to listen at: 0.0.0.0 lets other machines look, too."""
    open_browser: bool = True
    """Open the page, where there is a desktop."""

    def main(self) -> None:
        """Decode, start the viewer, and stay until interrupted."""
        decoded = codec.read(self.scene)
        from nerfstudio.scripts.viewer.run_viewer import RunViewer, ViewerConfigWithoutNumRays

        from masked_wavelet_nerf.runs import write_run

        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        if self.open_browser and _has_desktop():
            threading.Thread(target=self._open_page, daemon=True).start()
        with tempfile.TemporaryDirectory(prefix="mwnerf-view-") as folder:
            config = write_run(decoded, Path(folder))
            viewer = ViewerConfigWithoutNumRays(websocket_host=self.host, websocket_port=self.port)
            try:
                RunViewer(config, viewer).main()
            except KeyboardInterrupt:
                return

    def _open_page(self) -> None:
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            with socket.socket() as probe:
                probe.settimeout(1)
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    break
            time.sleep(0.2)
        webbrowser.open(f"http://localhost:{self.port}")


def _has_desktop() -> bool:
    """Else a browser for terminals might take this one over."""
    names = ("DISPLAY", "WAYLAND_DISPLAY")
    return sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in names)
