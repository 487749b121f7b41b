"""What nerfstudio's viewer shows of us beside pictures and sliders; found on model and pipeline.

Everybody starts at a camera of the capture: nerfstudio's fixed place may look past the scene.
"""

from __future__ import annotations

import atexit
import math
import time
from typing import Any

import numpy as np
import viser
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.viewer.viewer import VISER_NERFSTUDIO_SCALE_RATIO, Viewer
from nerfstudio.viewer.viewer_elements import ViewerControl
from scipy.spatial.transform import Rotation

from masked_wavelet_nerf.coverage import measure

_LAST_RENDER_SECONDS = 10.0


class StartAtACamera(ViewerControl):
    """An attribute of a model: nerfstudio finds it there when it sets up its viewer."""

    def _setup(self, viewer: Viewer) -> None:
        super()._setup(viewer)
        atexit.register(end_renders, viewer)
        cameras = viewer.pipeline.datamanager.train_dataset.cameras  # pyright: ignore[reportOptionalMemberAccess]
        start = middle_camera(cameras)

        init_scene = viewer.init_scene

        def without_its_photo(*args: Any, **kwargs: Any) -> None:
            # Which would hang right before the eyes of who stands there.
            init_scene(*args, **kwargs)
            if start in viewer.camera_handles:
                viewer.camera_handles[start].visible = False

        viewer.init_scene = without_its_photo
        viewer.viser_server.on_client_connect(
            lambda client: stand_at_a_camera(client, cameras, start)
        )


class StatusLine(ViewerControl):
    """Text above the viewer's tabs. nerfstudio's own elements would render anew at each change."""

    def __init__(self) -> None:
        self._line: viser.GuiMarkdownHandle | None = None

    def _setup(self, viewer: Viewer) -> None:
        super()._setup(viewer)
        below_step_and_resolution = viewer.stats_markdown.order + 0.5
        gui = viewer.viser_server.gui
        self._line = gui.add_markdown("", order=below_step_and_resolution, visible=False)

    def say(self, text: str) -> None:
        """Shows Markdown, where a viewer is open."""
        if self._line is not None and self._line.content != text:
            self._line.content, self._line.visible = text, True


def end_renders(viewer: Viewer) -> None:
    """Ends the threads that render for clients, within seconds.

    nerfstudio leaves them to the end of the process, which aborts it (SIGABRT, perhaps a core dump
    for who pressed ctrl+c) where one of them is inside torch: the interpreter ends such a thread by
    unwinding its C++ frames.
    """
    machines = list(viewer.render_statemachines.values())
    for machine in machines:
        machine.running = False
        machine.interrupt_render_flag = True  # of the picture under way
    end = time.monotonic() + _LAST_RENDER_SECONDS
    for machine in machines:
        machine.join(max(0.0, end - time.monotonic()))


def middle_camera(cameras: Cameras) -> int:
    """The one next to the middle of all."""
    positions = cameras.camera_to_worlds[:, :, 3]
    return int((positions - positions.mean(dim=0)).norm(dim=-1).argmin())


def stand_at_a_camera(client: viser.ClientHandle, cameras: Cameras, index: int) -> None:
    """Moves a client to a camera, to turn about what all of them look at.

    Args:
        client: of the viewer.
        cameras: of the capture; viser's look along +z, with y down, and its unit is a tenth.
        index: of one of them.
    """
    pose = cameras.camera_to_worlds[index].double().cpu().numpy()
    look_at, height = measure(cameras).look_at, float(cameras.height[index])
    distance = 1.0 if look_at is None or look_at.distance <= 0 else look_at.distance
    x, y, z, w = Rotation.from_matrix(pose[:, :3] * [1, -1, -1]).as_quat()
    with client.atomic():
        client.camera.wxyz = np.array([w, x, y, z])
        client.camera.position = VISER_NERFSTUDIO_SCALE_RATIO * pose[:, 3]
        client.camera.look_at = VISER_NERFSTUDIO_SCALE_RATIO * (pose[:, 3] - distance * pose[:, 2])
        client.camera.fov = 2 * math.atan(height / (2 * float(cameras.fy[index])))
