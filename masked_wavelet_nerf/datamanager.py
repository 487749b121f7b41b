"""Data manager: nerfstudio's, with mended captures, reproducible steps, only pixels that matter."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from jaxtyping import Bool
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.datamanagers.base_datamanager import (
    VanillaDataManager,
    VanillaDataManagerConfig,
    variable_res_collate,
)
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataparserOutputs
from nerfstudio.data.pixel_samplers import PixelSamplerConfig
from nerfstudio.data.utils.dataloaders import (
    FixedIndicesEvalDataloader,
    RandIndicesEvalDataloader,
)
from nerfstudio.model_components.ray_generators import RayGenerator
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from masked_wavelet_nerf.captures import Fault, find_faults, mend, parse, select_views
from masked_wavelet_nerf.dataparsers.captures import CaptureError, MissingCaptureError
from masked_wavelet_nerf.errors import FatalError, UserError
from masked_wavelet_nerf.photos import PhotoDataset
from masked_wavelet_nerf.pixel_sampler import PooledPixelSampler, PooledPixelSamplerConfig
from masked_wavelet_nerf.stored_capture import CamerasOnlyDataset, read_stored_capture

_STEPS_AT_ONCE = 8
_NUM_VIEWS_MEASURED_INSTEAD = 4


class _RandomState(NamedTuple):
    """State of Python's and torch's random numbers; that of a CUDA device where there is one."""

    python: tuple
    host: Tensor
    device: Tensor | None

    @staticmethod
    def seed(seed: int, device: torch.device) -> None:
        # Not torch.manual_seed, which writes down a stack trace for every kind of device that it
        # knows and that is not in use: half a millisecond.
        random.seed(seed)
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)

    @classmethod
    def now(cls, device: torch.device) -> _RandomState:
        on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(random.getstate(), torch.get_rng_state(), on_device)

    def restore(self, device: torch.device) -> None:
        random.setstate(self.python)
        torch.set_rng_state(self.host)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device, device)


@dataclass
class WaveletDataManagerConfig(VanillaDataManagerConfig):
    """nerfstudio's data manager; captures are mended, and every step draws from a random state of
    its own."""

    _target: type = field(default_factory=lambda: WaveletDataManager)
    """Target class to instantiate."""
    pixel_sampler: PixelSamplerConfig = field(default_factory=PooledPixelSamplerConfig)
    """Specifies the pixel sampler used to sample pixels from images."""
    patch_size: int = 1
    """Side, in pixels, of the square patches that training draws in place of single pixels, for
    losses that compare neighbours."""
    patch_share: float = 0.5
    """Share of a batch's rays that lie in patches, where patch-size is above 1; the others are
    single pixels. Pixels of a patch are much alike: of patches alone (1.0), a step learns from few
    places, and wants many more rays."""
    scene: Path | None = None
    """A .mwnf file: cameras are brought into its coordinates. Where ``data`` is that file, too, its
    own cameras take the place of a capture's."""


class _NoPhotos(FixedIndicesEvalDataloader):
    """What evaluation goes through where there is nothing to compare with."""

    def __iter__(self) -> NoReturn:
        raise FatalError(
            "Measuring needs the photos of the capture, which this decoded run has not: decode the "
            "file again with --data CAPTURE"
        )


class WaveletDataManager(VanillaDataManager[PhotoDataset]):
    """See :class:`WaveletDataManagerConfig`.

    What is wrong with a capture is printed once. Where evaluation has no photos, a few of those for
    training are measured instead. Without a capture (see ``scene`` of the config) there are rays of
    cameras, but nothing to train on or to measure.

    A step's random numbers depend on the seed (``--machine.seed``) and the step alone, so a resumed
    run draws what the uninterrupted one would have drawn. Rays of several steps are made at once:
    nerfstudio's some hundred small operations take as long for one step's as for those of eight.

    Raises:
        MissingCaptureError: if the capture, its photos or a file of its poses are not there.
        CaptureError: if it cannot be read, or nothing in it can be trained on.
        CodecError: if ``scene`` is not a file of ours.
        UserError: if ``patch_size`` does not suit photos, masks or rays per batch.
    """

    config: WaveletDataManagerConfig

    def __init__(self, config: WaveletDataManagerConfig, *args, **kwargs) -> None:
        self.stored = None if config.scene is None else read_stored_capture(config.scene)
        self._last_step: int | None = None
        self._seed = torch.initial_seed()
        self._prepared: dict[int, tuple[RayBundle, dict, _RandomState]] = {}
        self._told: set[str] = set()
        super().__init__(config, *args, **kwargs)

    @property
    def dataparser(self) -> DataParser:
        """The configured data parser; what it returns is mended."""
        return self._dataparser

    @dataparser.setter
    def dataparser(self, parser: DataParser) -> None:
        # On the parser itself, for nerfstudio's constructor and scripts call it there.
        self._dataparser = parser
        parser.get_dataparser_outputs = self._read_capture

    @property
    def has_photos(self) -> bool:
        """Whether a capture is at hand, rather than a file's cameras alone."""
        return self.stored is None or self.config.data != self.config.scene

    def _read_capture(self, split: str = "train", **kwargs: Any) -> DataparserOutputs:
        outputs = self._parse_capture(split, **kwargs)
        if outputs.cameras.metadata is None:
            outputs.cameras.metadata = {}  # ns-export cameras adds to it, and fails without
        return outputs

    def _parse_capture(self, split: str, **kwargs: Any) -> DataparserOutputs:
        if self.stored is not None and not self.has_photos:
            if self.test_mode == "val":
                raise MissingCaptureError(
                    f"{self.config.data}: holds cameras, but no photos to train on; expected a "
                    "capture: give its folder as --data"
                )
            return self.stored.outputs(split)
        outputs = parse(self._dataparser, split, **kwargs)
        if self.stored is not None:
            outputs = self.stored.align(outputs)
        if self.test_mode == "inference" and not _any_exists(outputs):
            return outputs  # rendering needs cameras alone
        outputs, faults = mend(outputs, split)
        self._tell(faults)
        if self.test_mode == "inference":
            return outputs
        self._tell(find_faults(outputs, split))
        if not outputs.image_filenames:
            train = self.train_dataparser_outputs
            count = len(train.image_filenames)
            views = np.linspace(0, count - 1, min(count, _NUM_VIEWS_MEASURED_INSTEAD))
            outputs = select_views(train, views.round().astype(int).tolist())
        return outputs

    def _tell(self, faults: Iterable[Fault]) -> None:
        for fault in faults:
            if fault.is_fatal:
                error = MissingCaptureError if fault.kind == "missing" else CaptureError
                raise error(fault.message)
            if fault.message not in self._told:
                CONSOLE.print(fault.message, style="yellow", markup=False, highlight=False)
                self._told.add(fault.message)

    def create_train_dataset(self) -> PhotoDataset:
        """Photos for training, or cameras without."""
        if self.has_photos:
            return super().create_train_dataset()
        return CamerasOnlyDataset(self.train_dataparser_outputs)  # whose cameras are scaled already

    def create_eval_dataset(self) -> PhotoDataset:
        """Photos for evaluation, or cameras without."""
        if self.has_photos:
            return super().create_eval_dataset()
        return CamerasOnlyDataset(self.dataparser.get_dataparser_outputs(split=self.test_split))

    def setup_train(self) -> None:
        """Sets up training on photos in an order, by which pixels are drawn, of the seed alone."""
        if not self.has_photos:
            self.iter_train_image_dataloader = repeat(_blank_photos(self.train_dataset))
            rays = self.config.train_num_rays_per_batch
            self.train_pixel_sampler = self._get_pixel_sampler(self.train_dataset, rays)
            self.train_ray_generator = RayGenerator(self.train_dataset.cameras.to(self.device))
            return
        random.seed(self._seed)  # whatever reading the capture drew
        super().setup_train()
        if self.config.patch_size > 1:
            sampler, images = self.train_pixel_sampler, next(self.iter_train_image_dataloader)
            if not isinstance(sampler, PooledPixelSampler) or not isinstance(images, dict):
                raise UserError(
                    f"patch-size: pixel-sampler is {type(sampler).__name__}, which draws no such "
                    f"patches; expected {PooledPixelSampler.__name__}, which is the default"
                )
            sampler.draw_patches(self.config.patch_size, self.config.patch_share, images)

    def setup_eval(self) -> None:
        """Sets up evaluation, whose photos may have several sizes though training's have one."""
        assert self.eval_dataset is not None
        if not self.has_photos:
            dataset, device = self.eval_dataset, self.device
            self.fixed_indices_eval_dataloader = _NoPhotos(dataset, device=device)
            self.eval_dataloader = RandIndicesEvalDataloader(dataset, device=device)
            return
        collate = self.config.collate_fn
        if self.eval_dataset.cameras.is_jagged:
            self.config.collate_fn = variable_res_collate
        super().setup_eval()
        self.config.collate_fn = collate

    def next_train(self, step: int) -> tuple[RayBundle, dict]:
        """Rays and pixels of one training step; seeds torch and random for the whole step."""
        # ns-export asks for step 0 again and again, and wants other pixels each time.
        is_repeated = not self.training and step == self._last_step
        self._last_step = step
        if is_repeated:
            return super().next_train(step)
        found = self._prepared.pop(step, None)
        if found is None or len(found[0]) != self.get_train_rays_per_batch():
            found = self._prepare(step)
        rays, batch, state = found
        state.restore(torch.device(self.device))
        self.train_count += 1
        return rays, batch

    def _prepare(self, step: int) -> tuple[RayBundle, dict, _RandomState]:
        """Makes the rays and pixels of some steps, and returns those of the first.

        With them comes the random state in which drawing the pixels left the step.
        """
        drawn, device = [], torch.device(self.device)
        for ahead in range(_STEPS_AT_ONCE if self.training else 1):
            _RandomState.seed((self._seed * 1_000_003 + step + ahead) % (1 << 63), device)
            images = next(self.iter_train_image_dataloader)
            assert isinstance(images, dict) and self.train_pixel_sampler is not None
            batch = self.train_pixel_sampler.sample(images)
            drawn.append((batch, _RandomState.now(device)))
        rays = self.train_ray_generator(torch.cat([batch["indices"] for batch, _ in drawn]))
        stop = 0
        for ahead, (batch, state) in enumerate(drawn):
            start, stop = stop, stop + len(batch["indices"])
            self._prepared[step + ahead] = rays[start:stop], batch, state
        return self._prepared.pop(step)

    @torch.no_grad()
    def restrict_pixels(
        self, is_useful: Callable[[RayBundle], Bool[Tensor, "*batch"]]
    ) -> float | None:
        """Trains from now on only on pixels whose rays are useful, or on patches around such.

        Args:
            is_useful: for a bundle of an image's rays (H, W), which of them can see anything.

        Returns:
            The fraction of pixels that stays, or None where restricting does not apply: images of
            several sizes, other pixel samplers, or no useful pixel at all.
        """
        sampler = self.train_pixel_sampler
        batch = next(self.iter_train_image_dataloader)
        assert isinstance(batch, dict)
        images = batch["image"]
        if not isinstance(sampler, PooledPixelSampler) or not isinstance(images, Tensor):
            return None
        if self.config.train_num_images_to_sample_from != -1:
            return None  # the batch changes: a pool of indices into it would not
        cameras = self.train_ray_generator.cameras
        useful = torch.stack(
            [
                is_useful(cameras.generate_rays(camera_indices=int(index)))
                for index in batch["image_idx"]
            ]
        )
        usable = sampler.usable(batch)
        if usable is not None:
            useful &= usable.to(useful.device)
        pool = useful.flatten().nonzero()[:, 0]
        sampler.pool = pool if len(pool) else None
        self._prepared.clear()
        return len(pool) / useful.numel() if len(pool) else None


def _blank_photos(dataset: PhotoDataset) -> dict:
    """A batch of all photos, as large as cameras say, that takes no memory."""
    cameras, blank = dataset.cameras, torch.zeros(1)
    sizes = torch.cat((cameras.height, cameras.width), dim=-1).tolist()
    images = [blank.expand(*size, 3) for size in sizes]
    image = images if cameras.is_jagged else blank.expand(len(images), *sizes[0], 3)
    return {"image_idx": torch.arange(len(images)), "image": image}


def _any_exists(outputs: DataparserOutputs) -> bool:
    return any(path.exists() for path in outputs.image_filenames)
