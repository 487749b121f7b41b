"""Normals and kept shares at surfaces, against closed forms and plain loops."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle
from test_ndc import one_camera

from masked_wavelet_nerf.field import FieldConfig, WaveletPlaneField
from masked_wavelet_nerf.planes import LINE_AXES, PLANE_AXES
from masked_wavelet_nerf.rendering import Space
from masked_wavelet_nerf.surface import KeptMaps, kept_maps, normals

BOX = Space(torch.tensor([[-2.0, -1.0, 0.5], [1.0, 3.0, 1.5]]), False, None)
CONTRACTED = Space(torch.tensor([[-3.0, -2.0, -1.0], [5.0, 2.0, 7.0]]), True, None)
NDC = Space(torch.tensor([[-1.3, -1.1, -1.0], [1.3, 1.1, 1.0]]), True, one_camera())
SPACES = {"box": BOX, "contracted": CONTRACTED, "ndc": NDC}


def make_field(resolution=(11, 7, 13), **changes) -> WaveletPlaneField:
    settings = {
        "num_density_components": 2,
        "num_appearance_components": 3,
        "appearance_dim": 4,
        "hidden_dim": 8,
        "num_levels": 2,
        **changes,
    }
    torch.manual_seed(0)
    return WaveletPlaneField(FieldConfig(**settings), resolution)


# --- normals --------------------------------------------------------------------------------------


def to_world(points: torch.Tensor, space: Space) -> torch.Tensor:
    """The inverse of grid_points, by hand."""
    low, high = space.box.double()
    points = points.double()
    if space.projection is not None:
        ndc = (low + high) / 2 + points * (high - low) / 2
        found = F.pad(ndc, (0, 1), value=1.0) @ torch.linalg.inv(space.projection.double()).T
        return found[:, :3] / found[:, 3:]
    if not space.is_unbounded:
        return (low + high) / 2 + points * (high - low) / 2
    most = points.abs().amax(dim=-1, keepdim=True)
    # Contracted: m ↦ m / 2 up to 1, 1 - 1 / 2m beyond.
    stretched = torch.where(most <= 0.5, 2 * most, 0.5 / (1 - most).clamp(min=1e-9))
    return (low + high) / 2 + points / most.clamp(min=1e-9) * stretched * (high - low) / 4


def some_positions(name: str) -> torch.Tensor:
    """Inside the box; within the unit cube and beyond it; at several depths before the camera."""
    generator = torch.Generator().manual_seed(1)
    random = 2 * torch.rand(40, 3, generator=generator) - 1
    if name == "box":
        return torch.tensor([-0.5, 1.0, 1.0]) + 0.85 * random * torch.tensor([1.5, 2.0, 0.5])
    if name == "contracted":
        # Away from where two coordinates are equal: there, contraction has a kink.
        _, middle, most = random.abs().sort(dim=-1).values.unbind(dim=-1)
        random = (random / most[:, None])[middle < 0.8 * most]
        share = torch.linspace(0.3, 4.0, len(random))[:, None]
        return torch.tensor([1.0, 0.0, 3.0]) + share * random * torch.tensor([2.0, 1.0, 2.0])
    depth = torch.linspace(2.3, 7.0, 40)
    across = 0.8 * random * torch.tensor([0.5, 0.0, 0.25])
    return depth[:, None] * (across + torch.tensor([0.0, 1.0, 0.0]))


def angles(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Degrees between unit vectors."""
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(len(found)))
    cosine = (found.double() * F.normalize(expected.double(), dim=-1)).sum(dim=-1)
    return torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))


def normals_of(logarithm, name: str, positions: torch.Tensor) -> torch.Tensor:
    """Of a density whose logarithm is given in the world."""
    space, field = SPACES[name], make_field((96, 128, 80), num_levels=0)
    field.density = lambda spatial, points: logarithm(to_world(points, space)).exp().float()
    spatial = field.to_spatial()
    with torch.no_grad():
        return normals(field, spatial, positions, space)


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("towards", [(1.0, -2.0, 0.5), (-0.3, 0.4, 1.0), (0.0, -1.0, 0.0)])
def test_normals_of_a_plane_point_out_of_it(name, towards):
    """Density falls along one direction of the world, wherever one looks."""
    outwards = F.normalize(torch.tensor(towards), dim=0)
    positions = some_positions(name)
    middle = positions.mean(dim=0)

    def logarithm(world):
        return 40 - 1.5 * ((world - middle) @ outwards.double())

    found = normals_of(logarithm, name, positions)
    worst = {"box": 0.1, "contracted": 3.0, "ndc": 1.0}[name]
    assert float(angles(found, outwards.expand_as(found)).max()) < worst


@pytest.mark.parametrize("name", SPACES)
def test_normals_of_a_ball_point_away_from_its_middle(name):
    positions = some_positions(name)
    middle = positions.mean(dim=0)
    away = positions - middle
    far = away.norm(dim=-1) > 0.6
    positions, away = positions[far], away[far]
    assert len(positions) > 15
    found = normals_of(lambda world: 60 - 2 * (world - middle).norm(dim=-1), name, positions)
    worst = {"box": 1.0, "contracted": 4.0, "ndc": 2.0}[name]
    assert float(angles(found, away).max()) < worst


def test_beyond_the_unit_cube_axes_are_those_of_the_world():
    """Contracted, the grid's axes are at an angle to the world's, here of some 35 degrees."""
    place = torch.tensor([[1.0, 0.0, 3.0]]) + 3 * torch.tensor([[2.0, 0.7, -1.4]])
    for axis in range(3):
        outwards = torch.eye(3)[axis]
        found = normals_of(lambda world, axis=axis: 40 - 2 * world[:, axis], "contracted", place)
        assert float(angles(found, outwards[None]).max()) < 2


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("density", [0.0, 7.0])
def test_normals_are_zero_where_density_is_even(name, density):
    field = make_field()
    field.density = lambda spatial, points: torch.full_like(points[:, 0], density)
    found = normals(field, field.to_spatial(), some_positions(name), SPACES[name])
    assert found.abs().max() == 0


@pytest.mark.parametrize("index", range(3))
def test_normals_follow_the_real_planes(index):
    """Density of one line alone: it rises along the line's axis, so normals look back."""
    field = make_field(transform="identity", bits=None, masks=False, num_density_components=1)
    for grid in field.density_grid.grids:
        grid.coefficients[0].data.zero_()
    plane, line = field.density_grid.grids[index], field.density_grid.grids[3 + index]
    plane.coefficients[0].data.fill_(1.0)
    line.coefficients[0].data.copy_(torch.linspace(5, 25, line.spatial_size[0]))
    found = normals(field, field.to_spatial(), some_positions("box"), BOX)
    expected = -torch.eye(3)[LINE_AXES[index]].expand_as(found)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


# --- kept shares ----------------------------------------------------------------------------------


def shake_masks(field: WaveletPlaneField) -> None:
    generator = torch.Generator().manual_seed(2)
    for grid in field.grids().values():
        for logits in grid.logits:
            logits.data.copy_(torch.randn(logits.shape, generator=generator))


def slow_maps(field, num_levels, threshold) -> list[np.ndarray]:
    """Texel by texel: the share of kept coefficients in the entry that it lies in."""
    maps = []
    for pair in zip(field.density_grid.grids, field.appearance_grid.grids, strict=True):
        size = pair[0].spatial_size
        if len(size) == 1:
            continue
        finest = len(pair[0].coefficients) - 1
        image = np.zeros((finest + 1, *size))
        for level in range(finest + 1 if num_levels is None else num_levels + 1):
            side = 2 ** (finest if level == 0 else finest - level + 1)
            for place in np.ndindex(size):
                at = (slice(None), slice(None), *(n // side for n in place))
                kept = []
                for grid in pair:
                    values = grid.coefficients[level][at]
                    if len(grid.logits):
                        kept += (grid.logits[level][at] >= threshold).flatten().tolist()
                    else:
                        kept += [True] * values.numel()
                image[(level, *place)] = np.mean(kept)
        maps.append(image)
    fullest = np.max([image.reshape(len(image), -1).max(axis=1) for image in maps], axis=0)
    fullest = np.where(fullest > 0, fullest, 1)
    return [np.moveaxis(np.moveaxis(image, 0, -1) / fullest, -1, 0) for image in maps]


@pytest.mark.parametrize(
    ("changes", "num_levels", "threshold"),
    [
        ({}, None, 0.0),
        ({}, None, 0.7),
        ({}, None, 9.0),
        ({}, 0, 0.0),
        ({}, 1, -0.5),
        ({"num_levels": 3}, 2, 0.0),
        ({"num_levels": 0}, None, 0.0),
        ({"transform": "identity"}, None, 0.3),
        ({"transform": "identity"}, 0, 0.3),
        ({"masks": False}, None, 0.0),
        ({"masks": False}, 1, 0.0),
        ({"planes": "triplane"}, None, 0.0),
        ({"wavelet": "haar", "bits": None}, None, 0.0),
        ({"planes": "voxels"}, 1, 0.3),
        ({"planes": "voxels", "transform": "identity"}, None, 0.3),
    ],
)
def test_kept_maps_are_those_of_a_plain_loop(changes, num_levels, threshold):
    field = make_field(**changes)
    shake_masks(field)
    found = kept_maps(field, num_levels, threshold)
    assert found is not None
    nx, ny, nz = field.resolution
    planes = [(ny, nx), (nz, nx), (nz, ny)]
    sizes = [(nz, ny, nx)] if changes.get("planes") == "voxels" else planes
    assert [p.shape[1:] for p in found.images] == sizes
    for plane, expected in zip(found.images, slow_maps(field, num_levels, threshold), strict=True):
        np.testing.assert_allclose(plane.numpy(), expected, atol=1e-6)
        assert plane.min() >= 0 and plane.max() <= 1


def test_waves_have_no_place():
    assert kept_maps(make_field(transform="dct")) is None


@pytest.mark.parametrize("level", range(3))
def test_a_kept_coefficient_shows_where_it_changes_the_plane(level):
    """Of Haar's wavelet an entry changes just the texels that it lies on."""
    field = make_field(wavelet="haar", bits=None)
    for grid in field.grids().values():
        for logits, values in zip(grid.logits, grid.coefficients, strict=True):
            logits.data.fill_(-1.0)
            values.data.fill_(1.0)
    grid = field.grids()["density_planes.1"]
    (height, width), side = grid.spatial_size, (4, 4, 2)[level]
    grid.logits[level].data[0, -1, (height - 1) // side, width // side // 2] = 1.0  # at the end
    with torch.no_grad():
        changed = field.to_spatial().density.planes[1].abs().amax(dim=0) > 1e-6
    found = kept_maps(field)
    assert found is not None and changed.any() and not changed.all()
    for other in range(3):
        expected = changed if other == level else torch.zeros_like(changed)
        torch.testing.assert_close(found.images[1][other], expected.float())
    assert found.images[0].abs().max() == found.images[2].abs().max() == 0


def test_at_points_the_three_planes_are_averaged():
    nx, ny, nz, generator = 4, 3, 5, torch.Generator().manual_seed(3)
    xy, xz, yz = (
        torch.rand(2, *size, generator=generator) for size in ((ny, nx), (nz, nx), (nz, ny))
    )
    index = torch.tensor([[0, 0, 0], [3, 2, 4], [1, 2, 0], [2, 0, 3], [0, 1, 4]])
    points = 2 * index / (torch.tensor([nx, ny, nz]) - 1) - 1
    found = KeptMaps((xy, xz, yz)).at(points.float())
    expected = torch.stack([(xy[:, y, x] + xz[:, z, x] + yz[:, z, y]) / 3 for x, y, z in index])
    torch.testing.assert_close(found, expected)
    between = (points[1:2] + points[3:4]) / 2
    assert KeptMaps((xy, xz, yz)).at(between.float()).shape == (1, 2)
    assert PLANE_AXES == ((0, 1), (0, 2), (1, 2))


def test_voxels_are_looked_up_as_they_lie():
    volume = torch.rand(2, 5, 3, 4, generator=torch.Generator().manual_seed(3))
    index = torch.tensor([[0, 0, 0], [3, 2, 4], [1, 2, 0], [2, 0, 3]])
    points = 2 * index / (torch.tensor([4, 3, 5]) - 1) - 1
    expected = torch.stack([volume[:, z, y, x] for x, y, z in index])
    torch.testing.assert_close(KeptMaps((volume,)).at(points.float()), expected)


# --- what a model shows of them -------------------------------------------------------------------

RADIUS, MIDDLE = 0.8, torch.tensor([0.1, -0.2, 0.15])


@pytest.fixture
def ball(tiny_config, start):
    """A model whose density is a ball with a soft skin, and a camera before it."""
    model = start(tiny_config(initial_resolution=48, masks=True, levels=2)).pipeline.model.eval()

    def density(_, points):
        world = to_world(points, model.space).float()
        return ((RADIUS - (world - MIDDLE).norm(dim=-1)) / 0.02).clamp(max=20).exp()

    model.field.density = density
    return model


def bundle() -> RayBundle:
    """Rays along -z, side by side, from before the ball."""
    x, y = torch.meshgrid(torch.linspace(-1.4, 1.4, 21), torch.linspace(-1.4, 1.4, 21))
    origins = torch.stack((x, y, torch.full_like(x, 4.0)), dim=-1).view(-1, 3)
    directions = torch.tensor([0.0, 0.0, -1.0]).expand_as(origins)
    return RayBundle(origins, directions, torch.ones_like(origins[:, :1]))


def test_pictures_of_normals_are_grey_where_nothing_is(ball):
    rays = bundle()
    with torch.no_grad():
        outputs = ball(rays)
    found = outputs["normals"]
    assert found.shape == (441, 3) and found.min() >= 0 and found.max() <= 1
    across = rays.origins[:, :2] - MIDDLE[:2]
    distance = across.norm(dim=-1)
    missed, hit = distance > 1.2 * RADIUS, distance < 0.8 * RADIUS
    assert missed.sum() > 50 and hit.sum() > 30
    assert (found[missed] == 0.5).all()
    height = (RADIUS**2 - distance[hit] ** 2).sqrt()
    expected = torch.cat((across[hit], height[:, None]), dim=-1) / RADIUS
    assert float(angles(2 * found[hit] - 1, expected).max()) < 6


def test_training_makes_no_normals(ball):
    rays = bundle()
    rays.camera_indices = torch.zeros_like(rays.origins[:, :1]).long()
    outputs = ball.train()(rays)
    assert {"rgb", "accumulation", "depth"} == set(outputs)
    assert "normals" in ball.eval()(rays)


def one_picture(model) -> dict[str, torch.Tensor]:
    pose = torch.tensor([[[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 4]]])
    camera = Cameras(pose, fx=20.0, fy=20.0, cx=8.0, cy=6.0, width=16, height=12)
    return model.get_outputs_for_camera(camera)


def test_kept_shares_are_shown_in_the_viewer_alone(ball):
    shake_masks(ball.field)
    assert not [name for name in one_picture(ball) if name.startswith("kept")]
    levels, threshold = SimpleNamespace(value=1), SimpleNamespace(value=0.5)
    ball.levels_shown.gui_handle, ball.mask_threshold.gui_handle = levels, threshold
    outputs = one_picture(ball)
    names = [name for name in outputs if name.startswith("kept")]
    assert names == ["kept_level_0", "kept_level_1", "kept_level_2"]
    # Where the ball is, what the maps have at its surface; as the sliders say.
    maps = kept_maps(ball.field, 1, 0.5)
    assert maps is not None
    pose = torch.tensor([[[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 4]]])
    camera = Cameras(pose, fx=20.0, fy=20.0, cx=8.0, cy=6.0, width=16, height=12)
    rays = camera.generate_rays(camera_indices=0, keep_shape=True)
    ends = (rays.origins + outputs["depth"] * rays.directions).view(-1, 3)
    expected = maps.at(ball.space.grid_points(ends)).view(12, 16, 3)
    seen = outputs["accumulation"][..., 0] > 0.99
    gone = outputs["accumulation"][..., 0] < 1e-3
    assert seen.sum() > 20 and gone.sum() > 20
    for level, name in enumerate(names):
        torch.testing.assert_close(outputs[name][seen][:, 0], expected[seen][:, level])
        assert outputs[name][gone].abs().max() == 0
    assert outputs["kept_level_1"][seen].std() > 0.01
    assert outputs["kept_level_2"].abs().max() == 0
    # A moved slider is followed.
    levels.value = 2
    ball.levels_shown.cb_hook(ball.levels_shown)
    assert one_picture(ball)["kept_level_2"][seen].max() > 0


def test_waves_show_no_kept_shares(tiny_config, start):
    model = start(tiny_config(initial_resolution=6, transform="dct")).pipeline.model.eval()
    model.levels_shown.gui_handle = SimpleNamespace(value=0)
    model.mask_threshold.gui_handle = SimpleNamespace(value=0.0)
    assert not [name for name in one_picture(model) if name.startswith("kept")]


# --- pictures with opacity ------------------------------------------------------------------------


@pytest.mark.parametrize("background", ["white", "black", "random"])
def test_exports_get_colours_without_the_background(ball, background):
    """Random is over black once rendered. What is transparent has no colour of its own."""
    colours = torch.tensor([[[0.2, 0.9, 0.5], [1.0, 0.0, 0.3], [0.7, 0.7, 0.7], [0.4, 0.1, 0.0]]])
    opacity = torch.tensor([[[1.0], [0.25], [0.0], [0.6]]])
    behind = 1.0 if background == "white" else 0.0
    ball.config.background_color = background
    outputs = {"rgb": opacity * colours + (1 - opacity) * behind, "accumulation": opacity}
    found = ball.get_rgba_image(outputs)
    assert found.shape == (1, 4, 4)
    torch.testing.assert_close(found[..., 3:], opacity)
    seen = opacity[..., 0] > 0
    torch.testing.assert_close(found[seen][:, :3], colours[seen], atol=1e-5, rtol=1e-5)
    assert found.isfinite().all() and found.min() >= 0 and found.max() <= 1


def test_opacity_does_not_depend_on_the_background(ball):
    found = {}
    for background in ("white", "black", "random"):
        ball.config.background_color = background
        outputs = one_picture(ball)
        found[background] = ball.get_rgba_image(outputs)
        behind = float(background == "white")
        again = found[background][..., :3] * outputs["accumulation"]
        again = again + behind * (1 - outputs["accumulation"])
        torch.testing.assert_close(again, outputs["rgb"], atol=1e-4, rtol=0)
    seen = found["black"][..., 3] > 0.1
    assert seen.any() and not seen.all()
    for background in ("white", "random"):
        torch.testing.assert_close(found[background][..., 3], found["black"][..., 3])
        difference = found[background][seen] - found["black"][seen]
        assert difference.abs().max() < 1e-4


def test_other_outputs_are_nerfstudios(ball):
    outputs = one_picture(ball)
    found = ball.get_rgba_image(outputs, "normals")
    torch.testing.assert_close(found[..., :3], outputs["normals"])
    assert (found[..., 3] == 1).all()
