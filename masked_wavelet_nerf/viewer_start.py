"""Where whoever opens nerfstudio's viewer stands: at a camera of the capture.

nerfstudio has everybody start at a fixed place, which in a real capture may look past the scene.
"""

from __future__ import annotations

import math

import numpy as np
import viser
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.viewer.viewer import VISER_NERFSTUDIO_SCALE_RATIO, Viewer
from nerfstudio.viewer.viewer_elements import ViewerControl
from scipy.spatial.transform import Rotation

from masked_wavelet_nerf.coverage import measure


class StartAtACamera(ViewerControl):
    """An attribute of a model: nerfstudio finds it there when it sets up its viewer."""

    def _setup(self, viewer: Viewer) -> None:
        super()._setup(viewer)
        cameras = viewer.pipeline.datamanager.train_dataset.cameras  # pyright: ignore[reportOptionalMemberAccess]
        viewer.viser_server.on_client_connect(lambda client: stand_at_a_camera(client, cameras))


def stand_at_a_camera(client: viser.ClientHandle, cameras: Cameras) -> None:
    """Moves a client to the camera next to the middle of all, to turn about what they look at.

    Args:
        client: of the viewer.
        cameras: of the capture; viser's look along +z, with y down, and its unit is a tenth.
    """
    positions = cameras.camera_to_worlds[:, :, 3]
    middle = int((positions - positions.mean(dim=0)).norm(dim=-1).argmin())
    pose = cameras.camera_to_worlds[middle].double().cpu().numpy()
    look_at, height = measure(cameras).look_at, float(cameras.height[middle])
    distance = 1.0 if look_at is None or look_at.distance <= 0 else look_at.distance
    x, y, z, w = Rotation.from_matrix(pose[:, :3] * [1, -1, -1]).as_quat()
    with client.atomic():
        client.camera.wxyz = np.array([w, x, y, z])
        client.camera.position = VISER_NERFSTUDIO_SCALE_RATIO * pose[:, 3]
        client.camera.look_at = VISER_NERFSTUDIO_SCALE_RATIO * (pose[:, 3] - distance * pose[:, 2])
        client.camera.fov = 2 * math.atan(height / (2 * float(cameras.fy[middle])))
