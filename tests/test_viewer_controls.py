"""Where the viewer's clients start, with stand-ins for nerfstudio's viewer and viser's clients."""

from __future__ import annotations

import atexit
import contextlib
import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import viser
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.viewer.render_state_machine import RenderAction, RenderStateMachine
from nerfstudio.viewer.utils import parse_object
from nerfstudio.viewer.viewer import Viewer
from nerfstudio.viewer.viewer_elements import ViewerControl
from nerfstudio.viewer_legacy.server.viewer_utils import SetTrace
from scipy.spatial.transform import Rotation

from masked_wavelet_nerf.datasets.sample import look_at_origin
from masked_wavelet_nerf.viewer_controls import StartAtACamera, StatusLine, end_renders


def cameras() -> Cameras:
    """Three that look at the origin from 4 away, the second amid the others."""
    poses = np.stack([look_at_origin(angle, 0.2, radius=4.0) for angle in (0.0, 0.3, 0.7)])
    poses = torch.from_numpy(poses[:, :3]).float()
    return Cameras(poses, fx=30.0, fy=20.0, cx=20.0, cy=10.0, width=40, height=20)


def test_clients_start_at_the_middle_camera_and_turn_about_what_it_looks_at(
    tiny_config, start, monkeypatch
):
    model = start(tiny_config()).pipeline.model
    found = [control for _, control in parse_object(model, ViewerControl, "")]  # as nerfstudio does
    (control,) = [control for control in found if isinstance(control, StartAtACamera)]
    callbacks = []
    viewer = object.__new__(Viewer)
    viewer.pipeline = SimpleNamespace(
        datamanager=SimpleNamespace(train_dataset=SimpleNamespace(cameras=cameras()))
    )
    viewer.camera_handles = {}

    def init_scene(*names: str) -> None:
        viewer.camera_handles = {name: SimpleNamespace(visible=True) for name in range(len(names))}

    viewer.init_scene = init_scene
    viewer.viser_server = SimpleNamespace(on_client_connect=callbacks.append)
    at_exit = []
    monkeypatch.setattr(atexit, "register", lambda *call: at_exit.append(call))
    control._setup(viewer)
    assert at_exit == [(end_renders, viewer)]
    (connect,) = callbacks
    client, camera = object.__new__(viser.ClientHandle), SimpleNamespace()
    client.camera, client.atomic = camera, contextlib.nullcontext
    connect(client)
    pose = cameras().camera_to_worlds[1].numpy()
    np.testing.assert_allclose(camera.position, 10 * pose[:, 3], rtol=1e-5)
    np.testing.assert_allclose(camera.look_at, np.zeros(3), atol=1e-4)
    w, x, y, z = camera.wxyz
    axes = Rotation.from_quat([x, y, z, w]).as_matrix()
    np.testing.assert_allclose(axes[:, 0], pose[:, 0], atol=1e-6)  # right
    np.testing.assert_allclose(axes[:, 1], -pose[:, 1], atol=1e-6)  # down
    np.testing.assert_allclose(axes[:, 2], -pose[:, 2], atol=1e-6)  # forward
    assert camera.fov == pytest.approx(2 * math.atan(0.5))
    viewer.init_scene("three", "training", "cameras")
    shown = [handle.visible for handle in viewer.camera_handles.values()]
    assert shown == [True, False, True]  # its photo would hide the scene


def test_a_picture_under_way_is_given_up_when_the_process_ends():
    begun = threading.Event()

    class Endless(RenderStateMachine):
        def _render_img(self, _):
            with SetTrace(self.check_interrupt):
                while True:
                    begun.set()

    viewer, client = object.__new__(Viewer), object.__new__(viser.ClientHandle)
    viewer.ready, viewer.get_camera_state = True, lambda client: None
    machine = Endless(viewer, 10.0, client)
    viewer.render_statemachines = {0: machine}
    machine.action(RenderAction("move", None))
    machine.start()
    assert begun.wait(60)
    end_renders(viewer)
    assert not machine.is_alive()


def test_a_status_line_shows_what_it_is_told_below_step_and_resolution():
    line, calls = StatusLine(), []
    line.say("no viewer is open")

    def add_markdown(content: str, order: float, visible: bool) -> SimpleNamespace:
        calls.append((content, order, visible))
        return SimpleNamespace(content=content, visible=visible)

    viewer = object.__new__(Viewer)
    viewer.stats_markdown = SimpleNamespace(order=3.0)
    viewer.viser_server = SimpleNamespace(gui=SimpleNamespace(add_markdown=add_markdown))
    line._setup(viewer)
    assert calls == [("", 3.5, False)]
    line.say("**now**")
    assert (line._line.content, line._line.visible) == ("**now**", True)
