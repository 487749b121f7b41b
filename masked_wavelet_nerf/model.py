"""The nerfstudio model: a wavelet-plane field rendered along rays, its losses and its schedule.

Letters: R rays, N packed samples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManager
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.engine.callbacks import (
    TrainingCallback,
    TrainingCallbackAttributes,
    TrainingCallbackLocation,
)
from nerfstudio.model_components import renderers
from nerfstudio.model_components.scene_colliders import AABBBoxCollider, NearFarCollider
from nerfstudio.models.base_model import Model
from nerfstudio.utils import colormaps
from nerfstudio.utils.rich_utils import CONSOLE
from nerfstudio.viewer.viewer_elements import ViewerSlider
from nerfstudio.viewer_legacy.server.viewer_utils import IOChangeException
from torch import Tensor
from torch.nn import Parameter

import masked_wavelet_codec as codec
from masked_wavelet_nerf import (
    accelerators,
    native,
    rendering,
    sensitivity,
    surface,
    threads,
    unbounded,
)
from masked_wavelet_nerf.config import MaskedWaveletModelConfig
from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.field import SpatialField, WaveletPlaneField
from masked_wavelet_nerf.loading import stored_settings
from masked_wavelet_nerf.masking import largest_integer
from masked_wavelet_nerf.metrics import SSIM_WINDOW, ImageMetrics, patch_ssim
from masked_wavelet_nerf.photo_appearance import PhotoAppearance
from masked_wavelet_nerf.pixel_sampler import PooledPixelSampler
from masked_wavelet_nerf.rate import mask_penalty, suited_integers
from masked_wavelet_nerf.rate_control import RateControl
from masked_wavelet_nerf.region import region_of_interest
from masked_wavelet_nerf.sampling import OccupancyGrid, PackedSamples
from masked_wavelet_nerf.scene import load_scene_into
from masked_wavelet_nerf.viewer_controls import StartAtACamera, StatusLine

_RAYS_PER_CHUNK = 1 << 14
"""Rays that are asked at once whether they can see anything."""


_TIMES_AS_MANY_ON_CUDA = 8
"""Rays per chunk of an image there: small chunks leave a GPU waiting for the host."""
_LEAST_SEEN = 1e-2
"""Opacity of rays that show a surface."""
_INITIAL_SLOPE = 0.197
"""σ' of masks as they start."""
_STEERING_STEPS = 10
"""Steps between corrections of λ on the way to a size."""
_STEERED_SHARE = 0.9
"""Of the steps that are left: when the size shall be there."""
_DRAWS = 8
"""Batches of rays that the sensitivity of bands is measured with."""
_BIT_SHARE = 0.2
"""Of λ: what a bit is worth in squared error, by the slope of PSNR against bytes on lego-100."""


_PER_PHOTO = ("camera_optimizer.", "photo_appearance.embeddings")
"""State that has a row for each training photo."""


class _Levels(NamedTuple):
    """To which level coefficients belong that are counted by grid and level."""

    of_count: Int[Tensor, " _"]
    """Level of each count. Lines have no levels: they come last, as one, if planes have any."""
    totals: Float[Tensor, " _"]
    """Coefficients of each level."""
    present: list[int]
    """Levels, but for that of lines, that have any."""

    @classmethod
    def of(cls, counts: list[list[int]], num_levels: int, device: torch.device) -> _Levels:
        of_count, totals = [], [0] * (num_levels + 2)
        for of_grid in counts:
            for level, total in enumerate(of_grid):
                has_levels = len(of_grid) > 1 or num_levels == 0
                of_count.append(level if has_levels else num_levels + 1)
                totals[of_count[-1]] += total
        present = [level for level in range(num_levels + 1) if totals[level]]
        return cls(
            torch.tensor(of_count).to(device),
            torch.tensor(totals, dtype=torch.float32).to(device),
            present,
        )


class CheckpointMismatchError(UserError):
    """A checkpoint does not hold what the configured model needs."""


class _BoxCollider(AABBBoxCollider):
    """nerfstudio's, in a third of its operations."""

    def _intersect_with_aabb(self, rays_o, rays_d, aabb):
        nearest = self.near_plane if self.training else 0.0
        nears, fars = rendering.limits_in_box(rays_o, rays_d, aabb, nearest)
        return nears[:, 0], fars[:, 0]


class MaskedWaveletModel(Model):
    """See the module's docstring."""

    config: MaskedWaveletModelConfig
    aabb: Float[Tensor, "2 3"]
    """Box of the planes: in the world, or in normalised device coordinates."""
    projection: Float[Tensor, "4 4"] | None
    """World to clip coordinates of forward-facing scenes."""

    def populate_modules(self) -> None:
        """Builds field, occupancy, samplers and renderers."""
        config = self.config
        start = None
        if config.init_from is not None:
            start = codec.read(config.init_from)
            settings = stored_settings(start)
            for entry in dataclasses.fields(settings):
                setattr(config, entry.name, getattr(settings, entry.name))
        self.register_buffer("aabb", self.scene_box.aabb.clone().float())
        self.register_buffer("projection", None)
        forward_facing = self.kwargs.get("metadata", {}).get("forward_facing")
        if config.contract and config.ndc and forward_facing is not None:
            self.projection = forward_facing.projection.clone()
            self.aabb.copy_(forward_facing.box)
        elif config.contract:
            self._set_region(self.aabb.clone())
        self.field = WaveletPlaneField(
            config.field_config(), self._resolution(config.initial_resolution)
        )
        self.camera_optimizer = config.camera_optimizer.setup(
            num_cameras=self.num_train_data, device="cpu"
        )
        self.photo_appearance = None
        if config.photo_appearance_dim > 0:
            sizes = config.photo_appearance_dim, config.hidden_dim
            self.photo_appearance = PhotoAppearance(self.num_train_data, *sizes)
        self.occupancy = OccupancyGrid()
        self.renderer_rgb = renderers.RGBRenderer(background_color=config.background_color)
        self.image_metrics = ImageMetrics()
        self._patch_size = 1
        self._pixel_sampler: PooledPixelSampler | None = None
        self._spatial: SpatialField | None = None
        self._proposal_of_spatial: unbounded.Proposal | None = None
        self._kept_of_spatial: surface.KeptMaps | None = None
        self._levels: tuple[list[list[int]], _Levels] | None = None
        self._has_distortion = config.contract and config.distortion_weight > 0
        self.rate = RateControl(
            self.field, self.occupancy, self.num_train_data, config.target_bytes
        )
        self._shown_in_image: tuple[int, float] | None = None
        if start is not None:
            load_scene_into(self, start)
        self._on_box_changed()

        self.starting_view, self.size_line = StartAtACamera(), StatusLine()
        self.levels_shown = ViewerSlider(
            "Levels shown",
            default_value=config.levels,
            min_value=0,
            max_value=max(config.levels, 1),
            step=1,
            cb_hook=self._forget_spatial,
            hint="Detail levels, coarse to fine; 0 shows the approximation only",
        )
        self.mask_threshold = ViewerSlider(
            "Mask threshold",
            default_value=0.0,
            min_value=-2.0,
            max_value=2.0,
            step=0.05,
            cb_hook=self._forget_spatial,
            hint="Coefficients whose mask lies below it are dropped; training uses 0",
        )

    # --- planes in the spatial domain -------------------------------------------------------------

    def train(self, mode: bool = True) -> MaskedWaveletModel:
        """Switches mode; training changes the coefficients, so the spatial planes are dropped."""
        if mode:
            self._forget_spatial()
            if self.training:  # nerfstudio asks before every step, and there are sixty modules
                return self
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True) -> MaskedWaveletModel:
        # The collider holds the box itself: follow it to another device.
        super()._apply(fn, recurse)
        self._levels = None
        self._on_box_changed()
        return self

    def _forget_spatial(self, _: object = None) -> None:
        self._spatial = self._proposal_of_spatial = self._kept_of_spatial = None

    def spatial(self) -> SpatialField:
        """The grids in the spatial domain: anew in every training step, kept in evaluation."""
        if self.training:
            return self.field.to_spatial()
        if self._shown_in_image not in (None, self._shown()):
            self._forget_spatial()
            raise IOChangeException  # the viewer drops this image and starts the next
        if self._spatial is None:
            with torch.no_grad():
                self._spatial = self.field.to_spatial(*self._shown())
        return self._spatial

    def _shown(self) -> tuple[int, float]:
        """Levels and mask threshold that the sliders say."""
        return int(self.levels_shown.value), float(self.mask_threshold.value)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ):
        """Loads a checkpoint of any resolution; refuses one that lacks anything.

        nerfstudio would otherwise fall back to a loose load, and train or render random planes.

        Raises:
            CheckpointMismatchError: naming what is missing, unexpected or of another shape.
        """
        try:
            state = self._of_these_photos(self.rate.complete(state_dict, "rate."))
            result = super().load_state_dict(state, strict=True, assign=assign)
        except RuntimeError as error:
            raise CheckpointMismatchError(
                "The checkpoint does not fit the configured model (planes, components, transform, "
                f"levels, masks?); load it with the config.yml of its own run. {error}"
            ) from error
        if self.config.mask_penalty != "rate":  # what another penalty may have left
            for grid in self.field.grids().values():
                grid.set_prices(None)
        self.refresh()
        return result

    def _of_these_photos(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state without what belongs to other training photos, which rendering can do without.

        As where a run is opened without its capture.
        """
        own = {k: v for k, v in self.state_dict().items() if k.startswith(_PER_PHOTO)}
        fitting = {
            key: value
            for key, value in state.items()
            if not key.startswith(_PER_PHOTO) or (key in own and own[key].shape == value.shape)
        }
        return {**own, **fitting}

    def refresh(self) -> None:
        """To be called when grids or box were replaced from outside."""
        self._forget_spatial()
        self._on_box_changed()

    # --- geometry ---------------------------------------------------------------------------------

    def _resolution(self, side: int) -> tuple[int, int, int]:
        extent = (self.aabb[1] - self.aabb[0]).tolist()
        voxel = (math.prod(extent) / side**3) ** (1 / 3)
        x, y, z = (max(2, round(e / voxel)) for e in extent)
        return x, y, z

    def _on_box_changed(self) -> None:
        """Recomputes what depends on box and resolution: collider, step size, steps per ray."""
        config = self.config
        if config.contract:
            self.collider = NearFarCollider(config.near_plane, config.far_plane)
            return
        box = SceneBox(aabb=self.aabb)
        self.collider = _BoxCollider(box, near_plane=config.near_plane)
        resolution = self.field.resolution
        self._step_size, self._num_steps = self.space.steps(resolution, config.step_ratio)

    def _set_region(self, region: Float[Tensor, "2 3"]) -> None:
        """Unbounded scenes: what is not contracted; the planes' box is twice as wide, and all."""
        centre = region.mean(dim=0)
        self.aabb.copy_(centre + 2 * (region - centre))
        self._on_box_changed()

    @property
    def space(self) -> rendering.Space:
        """Where the planes lie in the world."""
        return rendering.Space(self.aabb, self.config.contract, self.projection)

    # --- rendering --------------------------------------------------------------------------------

    def _proposal(self, spatial: SpatialField) -> unbounded.Proposal:
        """Where unbounded scenes have density, by a coarse level: kept as long as the planes."""
        if self.training:
            return rendering.find_proposal(self.field, spatial, self.config)
        if self._proposal_of_spatial is None:
            self._proposal_of_spatial = rendering.find_proposal(self.field, spatial, self.config)
        return self._proposal_of_spatial

    def _samples(self, rays: RayBundle, spatial: SpatialField) -> PackedSamples:
        """Where rays are evaluated."""
        assert rays.nears is not None and rays.fars is not None
        config = self.config
        jitter = torch.rand_like(rays.nears) if self.training else None
        if config.contract:
            proposal = self._proposal(spatial)
            return rendering.sample_everywhere(rays, self.space, proposal, config, jitter)
        fars, num_steps = rays.fars, self._num_steps
        if self.training:
            # Near and far bound training only, as in nerfstudio: a viewer may come as close, and go
            # as far, as it likes.
            fars = fars.clamp(max=config.far_plane)
            length = config.far_plane - config.near_plane
            num_steps = min(num_steps, math.ceil(length / self._step_size))
        steps = self._step_size, num_steps
        return rendering.sample_box(rays, fars, self.space, *steps, self.occupancy, jitter)

    def get_outputs(self, ray_bundle: RayBundle) -> dict[str, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Renders rays: rgb in [0, 1], accumulation, and expected depth along the ray.

        Evaluation adds normals there, as colours: (n + 1) / 2, grey where nothing is. The viewer
        also gets kept_level_0, … there: see :class:`.surface.KeptMaps`.
        """
        if self.training:
            self.camera_optimizer.apply_to_raybundle(ray_bundle)
        spatial, config = self.spatial(), self.config
        training: dict[str, Any] = {}
        if self.training:
            training = {
                "least_weight": config.colour_weight_threshold,
                "all_colours": True,
                "with_distortion": self._has_distortion,
                "offsets": self._offsets_of(ray_bundle),
            }
        samples = self._samples(ray_bundle, spatial)
        rgb, accumulation, depth, distortion = rendering.render(
            self.field, spatial, samples, ray_bundle, self.space, config, **training
        )
        if self.training:
            self._spatial_of_step, self._distortion_of_step = spatial, distortion
        rgb = self._over_background(rgb, accumulation)
        outputs = {"rgb": rgb, "accumulation": accumulation, "depth": depth}
        if not self.training:
            ends = ray_bundle.origins + depth * ray_bundle.directions
            outputs.update(self._at_surfaces(spatial, ends, accumulation))
        return outputs

    def _at_surfaces(
        self,
        spatial: SpatialField,
        ends: Float[Tensor, "R 3"],
        accumulation: Float[Tensor, "R 1"],
    ) -> dict[str, Tensor]:
        normals = surface.normals(self.field, spatial, ends, self.space)
        is_seen = accumulation > _LEAST_SEEN
        found = {"normals": torch.where(is_seen, (normals + 1) / 2, 0.5).clamp(0, 1)}
        if self._shown_in_image is not None and self._kept_of_spatial is None:
            self._kept_of_spatial = surface.kept_maps(self.field, *self._shown_in_image)
        if self._kept_of_spatial is not None:
            kept = self._kept_of_spatial.at(self.space.grid_points(ends)) * is_seen
            found.update({f"kept_level_{i}": kept[:, i : i + 1] for i in range(kept.shape[1])})
        return found

    def _offsets_of(self, rays: RayBundle) -> Callable[[Int[Tensor, " M"]], Tensor] | None:
        """What the photo of each ray adds to colours."""
        appearance, photos = self.photo_appearance, rays.camera_indices
        if appearance is None:
            return None
        assert photos is not None
        return lambda ray: appearance(photos[ray, 0])

    def _over_background(
        self, rgb: Float[Tensor, "R 3"], accumulation: Float[Tensor, "R 1"]
    ) -> Float[Tensor, "R 3"]:
        colour = self.config.background_color
        if colour != "random" or renderers.BACKGROUND_COLOR_OVERRIDE is not None:
            background = renderers.RGBRenderer.get_background_color(
                "black" if colour == "random" else colour, shape=rgb.shape, device=rgb.device
            )
            rgb = rgb + background * (1 - accumulation)
        return rgb if self.training else rgb.clamp(0, 1)

    def get_rgba_image(
        self, outputs: dict[str, Tensor], output_name: str = "rgb"
    ) -> Float[Tensor, "*size 4"]:
        """Colours as they are without a background, and opacity, by which exports leave out.

        nerfstudio takes all for opaque over any background but a random one.
        """
        if output_name != "rgb":
            return super().get_rgba_image(outputs, output_name)
        accumulation = outputs["accumulation"]
        background = float(self.config.background_color == "white") * (1 - accumulation)
        rgb = (outputs["rgb"] - background) / accumulation.clamp(min=1e-6)
        return torch.cat((rgb.clamp(0, 1), accumulation), dim=-1)

    # --- losses and metrics -----------------------------------------------------------------------

    def _true_and_rendered(self, outputs: dict, batch: dict) -> tuple[Tensor, Tensor]:
        rendered, true = self.renderer_rgb.blend_background_for_loss_computation(
            pred_image=outputs["rgb"],
            pred_accumulation=outputs["accumulation"],
            gt_image=batch["image"].to(self.device, non_blocking=True),
        )
        return true, rendered

    def get_loss_dict(self, outputs, batch, metrics_dict=None) -> dict[str, Tensor]:
        """Mean squared error, 1 - SSIM, mask penalty and regularisers, each times its weight."""
        config = self.config
        true, rendered = self._true_and_rendered(outputs, batch)
        losses = {"rgb_loss": F.mse_loss(rendered, true)}
        if not self.training:
            return losses
        if config.ssim_weight > 0:
            side, sampler = self._patch_size, self._pixel_sampler
            in_patches = slice(None if sampler is None else sampler.num_patches * side**2)
            ssim = patch_ssim(rendered[in_patches], true[in_patches], side)
            losses["ssim_loss"] = config.ssim_weight * (1 - ssim)
        spatial = self._spatial_of_step
        if config.masks and config.mask_weight > 0:
            penalty = spatial.logit_sum if config.mask_penalty != "mean" else None
            if penalty is None:
                prices = [price for grid in self.field.grids().values() for price in grid.prices]
                logits = self._grid_parameters("logits")
                penalty = mask_penalty(logits, config.mask_penalty, prices)
            losses["mask_loss"] = config.mask_weight * self.rate.factor() * penalty
        if self._has_distortion:
            losses["distortion_loss"] = config.distortion_weight * self._distortion_of_step.mean()
        self.camera_optimizer.get_loss_dict(losses)
        l1_weight = config.l1_weight if self.occupancy.is_known else config.l1_weight_initial
        if l1_weight > 0:
            # Channels last, as the planes are in memory: so is the gradient, then.
            means = [
                member.movedim(0, -1).abs().mean() for kind in spatial.density for member in kind
            ]
            losses["l1_loss"] = l1_weight * torch.stack(means).sum()
        for name, weight, grid in (
            ("density", config.tv_weight_density, spatial.density),
            ("appearance", config.tv_weight_appearance, spatial.appearance),
        ):
            if weight > 0:
                losses[f"tv_loss_{name}"] = (
                    weight
                    * torch.stack(
                        [
                            member.diff(dim=axis).square().mean()
                            for member in (*grid.planes, *grid.volumes)
                            for axis in range(1, member.ndim)
                        ]
                    ).sum()
                )
        return losses

    @torch.no_grad()
    def get_outputs_for_camera_ray_bundle(self, camera_ray_bundle: RayBundle) -> dict[str, Tensor]:
        """Renders an image; in the viewer, gives up as soon as a slider moves.

        nerfstudio calls a slider's hook only once the image under way is done, which at full
        resolution takes many seconds on a CPU. Of an image without pixels it would miss the depth,
        and draw nothing ever again: it asks for one at the first digit of a "Max res" of 128.
        """
        in_viewer = self.levels_shown.gui_handle is not None
        if in_viewer and not len(camera_ray_bundle):
            raise IOChangeException
        self._shown_in_image = self._shown() if in_viewer else None
        config = self.config
        if self.device.type == "cuda":
            rays = config.eval_num_rays_per_chunk * _TIMES_AS_MANY_ON_CUDA
            self.config = dataclasses.replace(config, eval_num_rays_per_chunk=rays)
        try:
            outputs = super().get_outputs_for_camera_ray_bundle(camera_ray_bundle)
            if in_viewer:
                self._tell_size(self.spatial())
            return outputs
        finally:
            self._shown_in_image = None
            self.config = config

    def _tell_size(self, spatial: SpatialField) -> None:
        kept = torch.cat(spatial.kept)
        share = float(kept.sum()) / sum(map(sum, self.field.num_coefficients()))
        num_bytes = float(self.rate.estimate(spatial.kept))
        self.size_line.say(
            f"File: some {num_bytes:,.0f} bytes  \nKept: {share:.2%} of coefficients"
        )

    @torch.no_grad()
    def get_metrics_dict(self, outputs, batch) -> dict[str, Tensor]:
        """PSNR of the batch; in training also kept fractions and estimated bytes."""
        true, rendered = self._true_and_rendered(outputs, batch)
        metrics = {"psnr": -10 * torch.log10(F.mse_loss(rendered, true))}
        if self.training:
            self.camera_optimizer.get_metrics_dict(metrics)
            kept = torch.cat(self._spatial_of_step.kept)
            metrics["kept"] = kept.sum() / sum(map(sum, self.field.num_coefficients()))
            metrics.update(self._kept_by_level(kept))
            metrics["estimated_bytes"] = self.rate.estimate([kept])
            if self.config.target_bytes is not None:
                metrics["mask_weight"] = self.config.mask_weight * self.rate.factor()
        return metrics

    def _kept_by_level(self, kept: Int[Tensor, " _"]) -> dict[str, Tensor]:
        counts = self.field.num_coefficients()
        if self._levels is None or self._levels[0] is not counts:
            self._levels = counts, _Levels.of(counts, self.config.levels, kept.device)
        levels = self._levels[1]
        by_level = torch.zeros_like(levels.totals).index_add(0, levels.of_count, kept.float())
        shares = (by_level / levels.totals).unbind()
        return {f"kept_level_{level}": shares[level] for level in levels.present}

    def get_image_metrics_and_images(self, outputs, batch):
        """PSNR, SSIM, LPIPS of a whole image, and pictures for the logs."""
        image = self.renderer_rgb.blend_background(batch["image"].to(outputs["rgb"].device))
        rgb = outputs["rgb"]
        images = {
            "img": torch.cat([image, rgb], dim=1),
            "accumulation": colormaps.apply_colormap(outputs["accumulation"]),
            "depth": colormaps.apply_depth_colormap(
                outputs["depth"], accumulation=outputs["accumulation"]
            ),
        }
        return self.image_metrics(image, rgb), images

    # --- schedule ---------------------------------------------------------------------------------

    def _grid_parameters(self, name: Literal["coefficients", "logits"]) -> list[Parameter]:
        return [p for grid in self.field.grids().values() for p in getattr(grid, name)]

    def get_param_groups(self) -> dict[str, list[Parameter]]:
        """Optimiser groups: grids, networks, and where there are any masks and camera_opt."""
        groups = {"grids": self._grid_parameters("coefficients")}
        if self.config.masks:
            groups["masks"] = self._grid_parameters("logits")
        groups["networks"] = list(self.field.networks().values())
        if self.photo_appearance is not None:
            groups["networks"] += self.photo_appearance.parameters()
        self.camera_optimizer.get_param_groups(groups)
        return groups

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> list[TrainingCallback]:
        """Occupancy updates and upsamplings, at their steps."""
        attributes = training_callback_attributes
        threads.flush_denormals()
        native.keep_freed_memory()
        if self.device.type == "cpu":
            CONSOLE.log(native.status())
        else:
            accelerators.try_out(self.field.colour_network, self.device)
            CONSOLE.log(accelerators.status())
        self._find_patches(attributes)
        self._find_region(attributes)
        self._restrict_pixels(attributes)  # a resumed run goes on with the pixels it had
        config = self.config
        steps = {*config.occupancy_steps, *config.upsample_steps, *config.rate_steps}
        return [
            TrainingCallback(
                where_to_run=[TrainingCallbackLocation.BEFORE_TRAIN_ITERATION],
                update_every_num_iters=1,
                func=self._round_networks,
            ),
            TrainingCallback(
                where_to_run=[TrainingCallbackLocation.AFTER_TRAIN_ITERATION],
                iters=tuple(sorted(steps)),
                func=self._follow_schedule,
                kwargs={"attributes": attributes},
            ),
            *self._steering(attributes),
        ]

    def _find_patches(self, attributes: TrainingCallbackAttributes) -> None:
        if self.config.ssim_weight <= 0:
            return
        manager = attributes.pipeline.datamanager  # pyright: ignore[reportOptionalMemberAccess]
        assert isinstance(manager, VanillaDataManager)
        self._patch_size = manager.config.patch_size
        if self._patch_size < SSIM_WINDOW:
            raise UserError(
                f"ssim-weight needs patches as large as SSIM's window, {SSIM_WINDOW} pixels, or "
                f"larger, not of {self._patch_size}: set --pipeline.datamanager.patch-size"
            )
        # Other samplers draw patches alone.
        sampler = manager.train_pixel_sampler
        self._pixel_sampler = sampler if isinstance(sampler, PooledPixelSampler) else None

    def _find_region(self, attributes: TrainingCallbackAttributes) -> None:
        """At the start of a training, where an unbounded scene is looked at."""
        trainer, pipeline = attributes.trainer, attributes.pipeline
        config = self.config
        is_given = config.init_from is not None or trainer is None or trainer._start_step > 0
        if not config.contract or is_given:
            return
        if self.projection is not None:
            CONSOLE.log("Cameras look the same way: planes in normalised device coordinates.")
            return
        dataset = pipeline.datamanager.train_dataset  # pyright: ignore[reportOptionalMemberAccess]
        assert dataset is not None
        region = region_of_interest(dataset.cameras, self.scene_box.aabb)
        self._set_region(region.to(self.aabb))
        corners = [", ".join(f"{x:.2f}" for x in corner) for corner in region.tolist()]
        CONSOLE.log(f"Planes resolve most from ({corners[0]}) to ({corners[1]}).")

    def _steering(self, attributes: TrainingCallbackAttributes) -> list[TrainingCallback]:
        config = self.config
        if config.target_bytes is None:
            return []
        if not config.masks or not config.rate_steps:
            raise UserError("target-bytes needs masks and rate-steps: without, nothing steers size")
        self.rate.check_target()
        trainer = attributes.trainer
        assert trainer is not None
        # A resumed run goes on for as many steps again.
        last = trainer._start_step + trainer.config.max_num_iterations
        first = min(config.rate_steps)
        if first >= last:
            raise UserError(
                f"target-bytes: the first of rate-steps, {first}, is not before the end, {last}"
            )

        def steer(step: int) -> None:
            if step >= first:
                progress = (step - first) / (_STEERED_SHARE * (last - first))
                self.rate.steer(self._spatial_of_step.kept, progress, _STEERING_STEPS)

        return [
            TrainingCallback(
                where_to_run=[TrainingCallbackLocation.AFTER_TRAIN_ITERATION],
                update_every_num_iters=_STEERING_STEPS,
                func=steer,
            )
        ]

    def _round_networks(self, step: int) -> None:
        # At every step, as a resumed run may start anywhere.
        if step >= self.config.network_rounding_step:
            self.field.round_networks()

    @torch.no_grad()
    def _follow_schedule(self, attributes: TrainingCallbackAttributes, step: int) -> None:
        config = self.config
        if step in config.occupancy_steps and not config.contract:
            first = not self.occupancy.is_known
            self.update_occupancy()
            if first and config.shrink_box:
                self.shrink_box()
                self.update_occupancy()
                self._forget_optimiser_state(attributes)
            self._restrict_pixels(attributes)
        if step in config.upsample_steps:
            resolution = self._resolution(self._sides()[step])
            # A scene to start from may be finer already.
            if config.init_from is None or math.prod(resolution) > math.prod(self.field.resolution):
                self.field.upsample(resolution)
                self._on_box_changed()
                self._forget_optimiser_state(attributes)
        if step in config.rate_steps:
            self._measure_rate(attributes)

    def _measure_rate(self, attributes: TrainingCallbackAttributes) -> None:
        config = self.config
        weight = self._bit_weight()
        if config.bits is not None and config.suit_quantiser and weight > 0:
            datamanager = attributes.pipeline.datamanager  # pyright: ignore[reportOptionalMemberAccess]
            assert isinstance(datamanager, VanillaDataManager)
            found = self.measure_sensitivity(lambda draw: datamanager.next_train(draw)[0])
            self.suit_quantiser(found, weight)
        prices = config.masks and config.mask_penalty == "rate"
        self.rate.measure(self.field.to_spatial().kept, prices)

    def measure_sensitivity(self, rays: Callable[[int], RayBundle]) -> list[Float[Tensor, " _"]]:
        """What a unit of squared error costs in mean squared error of pixels, per grid and level.

        Args:
            rays: some training rays by number: below zero, so that no step's are among them.
        """

        def render(draw: int) -> tuple[Tensor, list[Tensor]]:
            rgb = self(rays(draw - _DRAWS))["rgb"]
            return rgb, self._spatial_of_step.kept

        was_training = self.training
        self.train()
        coefficients = [list(grid.coefficients) for grid in self.field.grids().values()]
        found = sensitivity.measure(render, coefficients, _DRAWS)
        self.train(was_training)
        return found

    def suit_quantiser(self, sensitivities: list[Float[Tensor, " _"]], bit_weight: float) -> None:
        """Gives every band the quantiser step that suits what its errors cost.

        Args:
            sensitivities: see :meth:`measure_sensitivity`.
            bit_weight: mean squared error that a bit is worth.
        """
        most = largest_integer(self.rate.bits)
        for grid, of_grid in zip(self.field.grids().values(), sensitivities, strict=True):
            grid.set_largest(suited_integers(grid.extremes(), of_grid, bit_weight, most))
        self._forget_spatial()

    def _bit_weight(self) -> float:
        """Mean squared error that a bit is worth, as λ says."""
        weight = _BIT_SHARE * self.config.mask_weight * float(self.rate.factor())
        if self.config.mask_penalty == "mean":  # a slope of σ' over all coefficients
            return weight * _INITIAL_SLOPE / sum(map(sum, self.field.num_coefficients()))
        return weight

    def _sides(self) -> dict[int, int]:
        """Voxels per side after each upsampling, by equal factors."""
        config = self.config
        ratio = config.final_resolution / config.initial_resolution
        steps = sorted(config.upsample_steps)
        return {
            step: round(config.initial_resolution * ratio ** ((i + 1) / len(steps)))
            for i, step in enumerate(steps)
        }

    @staticmethod
    def _forget_optimiser_state(attributes: TrainingCallbackAttributes) -> None:
        assert attributes.optimizers is not None
        for name in ("grids", "masks"):
            if name in attributes.optimizers.optimizers:
                attributes.optimizers.optimizers[name].state.clear()

    def _restrict_pixels(self, attributes: TrainingCallbackAttributes) -> None:
        restrict = getattr(attributes.pipeline.datamanager, "restrict_pixels", None)  # pyright: ignore[reportOptionalMemberAccess]
        config = self.config
        if restrict is None or config.contract or not config.restrict_rays:
            return
        if not self.occupancy.is_known:
            return
        # From the occupancy alone, so that a resumed run finds the very same pixels.
        coarse = self.occupancy.coarsened()
        extent = (self.aabb[1] - self.aabb[0]).tolist()
        nodes = self.occupancy.cells.shape
        step = 2 * sum(e / (n - 1) for e, n in zip(extent, nodes, strict=True)) / 3
        num_steps = math.ceil(math.hypot(*extent) / step) + 1

        def hits(rays: RayBundle) -> Bool[Tensor, " R"]:
            assert self.collider is not None
            rays = self.collider(rays)
            assert rays.nears is not None and rays.fars is not None
            steps = step, num_steps
            samples = rendering.sample_box(rays, rays.fars + step, self.space, *steps, coarse, None)
            hit = torch.zeros(len(rays), dtype=torch.bool, device=rays.origins.device)
            return hit.index_fill(0, samples.ray, True)

        def can_see(rays: RayBundle) -> Bool[Tensor, "*batch"]:
            flat = rays.flatten()
            chunks = range(0, len(flat), _RAYS_PER_CHUNK)
            return torch.cat([hits(flat[i : i + _RAYS_PER_CHUNK]) for i in chunks]).view(rays.shape)

        fraction = restrict(can_see)
        if fraction is not None:
            CONSOLE.log(f"Training on the {fraction:.0%} of pixels that can see something.")

    def update_occupancy(self) -> None:
        """Looks for empty space, at the planes' resolution or ``occupancy_resolution``."""
        spatial = self.field.to_spatial()

        def opacity(points: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
            length = self._step_size * self.config.distance_scale
            return -torch.expm1(-self.field.density(spatial, points) * length)

        most = self.config.occupancy_resolution
        x, y, z = (min(n, most) for n in self.field.resolution)
        previous = self.occupancy.cells
        self.occupancy.update(opacity, (x, y, z), self.config.occupancy_threshold)
        if not self.occupancy.cells.any():
            self.occupancy.cells = previous
            CONSOLE.log("The scene looks empty so far: occupancy is left as it was.")
            return
        CONSOLE.log(f"Occupied: {self.occupancy.cells.float().mean():.1%} of the cube.")

    def shrink_box(self) -> None:
        """Shrinks the box to what is occupied, along texels: the rendered picture stays."""
        occupied = self.occupancy.occupied_range()
        if occupied is None or not self.occupancy.is_known:
            return
        start, stop = [], []
        for (first, last), nodes, n in zip(
            occupied, self.occupancy.cells.shape, self.field.resolution, strict=True
        ):
            scale = (n - 1) / (nodes - 1)
            start.append(max(0, math.floor(first * scale)))
            stop.append(min(n, max(start[-1] + 2, math.ceil(last * scale) + 1)))
        self._crop((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))

    def _crop(self, start: tuple[int, int, int], stop: tuple[int, int, int]) -> None:
        device = self.aabb.device
        size = torch.tensor(self.field.resolution, device=device) - 1
        low, high = self.aabb[0].clone(), self.aabb[1].clone()
        first = torch.tensor(start, device=device) / size
        last = (torch.tensor(stop, device=device) - 1) / size
        nodes = [
            torch.linspace(2 * float(a) - 1, 2 * float(b) - 1, e - s, device=device)
            for a, b, s, e in zip(first, last, start, stop, strict=True)
        ]
        alive = self.occupancy(torch.stack(torch.meshgrid(*nodes, indexing="ij"), dim=-1))
        self.field.crop(start, stop)
        self.aabb[0] = low + (high - low) * first
        self.aabb[1] = low + (high - low) * last
        self.occupancy.cells = alive
        self.refresh()
