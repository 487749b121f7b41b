"""nerfstudio's pipeline, which may start from a file, and writes one from the viewer."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig
from nerfstudio.utils.rich_utils import CONSOLE
from nerfstudio.viewer.viewer_elements import ViewerButton

import masked_wavelet_codec as codec
from masked_wavelet_nerf.config import MaskedWaveletModelConfig
from masked_wavelet_nerf.datamanager import WaveletDataManagerConfig
from masked_wavelet_nerf.errors import RefusedFileError, UserError
from masked_wavelet_nerf.model import MaskedWaveletModel
from masked_wavelet_nerf.run_scene import scene_of
from masked_wavelet_nerf.scene import SceneMismatchError
from masked_wavelet_nerf.viewer_controls import StatusLine

FILE_NAME = "scene.mwnf"
"""In the run's folder: what the viewer's button writes, as it was trained, whatever sliders say."""


@dataclass
class WaveletPipelineConfig(VanillaPipelineConfig):
    """nerfstudio's, whose model may start from a file."""

    _target: type = field(default_factory=lambda: WaveletPipeline)
    """Target class to instantiate."""


class WaveletPipeline(VanillaPipeline):
    """See :class:`WaveletPipelineConfig`; arguments are nerfstudio's.

    Raises:
        RefusedFileError: if the file to start from, or that of a decoded run, is no scene of ours;
            it ends nerfstudio's commands.
    """

    def __init__(self, config: VanillaPipelineConfig, *args: Any, **kwargs: Any) -> None:
        manager, model = config.datamanager, config.model
        assert isinstance(manager, WaveletDataManagerConfig)
        assert isinstance(model, MaskedWaveletModelConfig)
        if manager.scene is None:
            manager.scene = model.init_from
        try:
            super().__init__(config, *args, **kwargs)
        except (codec.CodecError, SceneMismatchError) as error:
            raise RefusedFileError(f"{model.init_from or manager.scene}: {error}") from error
        self.export_line = StatusLine()
        self.export_button = ViewerButton(
            f"Write {FILE_NAME}", cb_hook=lambda _: self._start_export()
        )
        self._export: threading.Thread | None = None

    def _start_export(self) -> None:
        # nerfstudio holds training while this runs: only as long as it takes to copy the scene.
        if self._export is not None and self._export.is_alive():
            return
        viewer = self.export_line.viewer
        folder = viewer.log_filename.parent
        if viewer.trainer is not None:
            config = viewer.trainer.config
        else:  # ns-viewer keeps it to itself; decoded runs have it above the folder of their log
            folder = next(f for f in (folder, *folder.parents) if (f / "config.yml").is_file())
            config = yaml.load((folder / "config.yml").read_text("utf8"), Loader=yaml.Loader)
        assert isinstance(self.model, MaskedWaveletModel)
        path = folder / FILE_NAME
        try:
            scene = scene_of(config, self.model, self, viewer.step, {})
        except UserError as error:
            self._tell(path, f"cannot be written: {error}")
            return
        self._export = threading.Thread(target=self._write, args=(path, scene))
        self._export.start()

    def _write(self, path: Path, scene: codec.Scene) -> None:
        self.export_line.say(f"Writing {path.name} …")
        try:
            num_bytes = codec.write(path, scene)
        except (OSError, codec.CodecError) as error:
            self._tell(path, f"cannot be written: {error}")
        else:
            self._tell(path, f"written, {num_bytes:,} bytes")

    def _tell(self, path: Path, result: str) -> None:
        # A path is wider than the panel.
        self.export_line.say(f"{path.name} {result.replace(str(path.parent), '')}")
        CONSOLE.print(f"{path}: {result}", markup=False, highlight=False, soft_wrap=True)
