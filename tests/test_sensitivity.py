"""What errors of coefficients cost in pixels: linear maps in closed form, and a trained model."""

from __future__ import annotations

import torch

from masked_wavelet_nerf import sensitivity

NUM_RAYS = 5
NUM_PIXELS = 3 * NUM_RAYS


class LinearScene:
    """Pixels p = A · v · mask of a draw; A of even draws and of odd ones differ."""

    def __init__(self, *kept_of_levels: tuple[int, int]) -> None:
        """Takes (kept, all) of each level."""
        generator = torch.Generator().manual_seed(1)
        self.values = [torch.randn(n, 1, 1, generator=generator) for _, n in kept_of_levels]
        self.masks = [torch.arange(n).view(n, 1, 1) < kept for kept, n in kept_of_levels]
        self.counts = torch.tensor([kept for kept, _ in kept_of_levels])
        self.maps = [
            [
                (1 + level) * torch.randn(NUM_PIXELS, n, generator=generator)
                for level, (_, n) in enumerate(kept_of_levels)
            ]
            for _ in range(2)
        ]
        for values in self.values:
            values.requires_grad_()

    def render(self, draw: int) -> torch.Tensor:
        terms = [
            matrix @ (values * mask).flatten()
            for matrix, values, mask in zip(
                self.maps[draw % 2], self.values, self.masks, strict=True
            )
        ]
        return sum(terms).view(NUM_RAYS, 3)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean over pixels of Σ A², by kept coefficient, and its standard deviation in a draw."""
        means, variances = [], []
        for level, mask in enumerate(self.masks):
            kept = mask.flatten().double()
            count = max(float(kept.sum()), 1)
            of_draws = [maps[level].double() * kept for maps in self.maps]
            means.append(sum((a**2).sum() for a in of_draws) / (2 * NUM_PIXELS * count))
            # Var zᵀ M z = 2 |M|² for normal z, with M = A Aᵀ.
            squares = [((a @ a.T) ** 2).sum() for a in of_draws]
            variances.append(sum(squares) / (NUM_PIXELS * count) ** 2)
        return torch.stack(means), torch.stack(variances).sqrt()


def measured(scene: LinearScene, num_draws: int) -> torch.Tensor:
    render = lambda draw: (scene.render(draw), [scene.counts])  # noqa: E731
    (found,) = sensitivity.measure(render, [scene.values], num_draws)
    return found


def test_the_mean_of_many_draws_is_the_closed_form():
    scene = LinearScene((7, 7), (20, 20), (3, 3))
    num_draws = 3000
    mean, deviation = scene.expected()
    assert (deviation / num_draws**0.5 < 0.03 * mean).all()
    with torch.no_grad():  # as a schedule's callback calls it
        found = measured(scene, num_draws)
    assert ((found - mean).abs() < 4 * deviation / num_draws**0.5).all()


def test_a_draw_of_one_pixel_is_its_squared_gradient():
    """Times one random number squared, the same for all: ratios are exact."""
    scene = LinearScene((7, 7), (20, 20), (2, 5))
    for maps in scene.maps:
        for matrix in maps:
            matrix[1:] = 0
    mean, _ = scene.expected()
    ratio = measured(scene, 1) / torch.stack(
        [
            (a[0] ** 2 * m.flatten()).sum() / m.sum()
            for a, m in zip(scene.maps[0], scene.masks, strict=True)
        ]
    )
    torch.testing.assert_close(ratio, ratio[:1].expand(3))
    assert 0 < ratio[0] * NUM_PIXELS < 10 and (mean > 0).all()


def test_dropped_coefficients_do_not_count():
    partly, alone = LinearScene((4, 9), (10, 20)), LinearScene((4, 9), (10, 20))
    # The same maps without the columns of what is dropped.
    for level, kept in enumerate((4, 10)):
        alone.values[level] = alone.values[level].detach()[:kept].requires_grad_()
        alone.masks[level] = alone.masks[level][:kept]
        for maps in alone.maps:
            maps[level] = maps[level][:, :kept]
    torch.testing.assert_close(measured(partly, 6), measured(alone, 6))


def test_levels_that_keep_nothing_cost_nothing():
    found = measured(LinearScene((4, 9), (0, 20)), 4)
    assert found[0] > 0 and found[1] == 0


def test_every_grid_gets_its_levels():
    scene = LinearScene((7, 7), (20, 20), (3, 3))
    render = lambda draw: (scene.render(draw), [scene.counts[:2], scene.counts[2:]])  # noqa: E731
    found = sensitivity.measure(render, [scene.values[:2], scene.values[2:]], 5)
    assert [len(levels) for levels in found] == [2, 1]
    torch.testing.assert_close(torch.cat(found), measured(scene, 5))


def test_the_same_is_found_again_and_nothing_else_is_touched():
    """A resumed run goes on with the same random numbers."""
    scene = LinearScene((7, 7), (20, 20))
    state = torch.get_rng_state()
    found = measured(scene, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(values.grad is None for values in scene.values)
    torch.rand(3)
    assert torch.equal(measured(scene, 3), found)


def test_errors_of_a_trained_model_cost_what_is_predicted(tiny_config, train):
    trainer, _ = train(tiny_config(steps=20, bits=None))
    model, datamanager = trainer.pipeline.model.eval(), trainer.pipeline.datamanager
    generator = torch.Generator().manual_seed(2)
    parts = model.field.grids()
    with torch.no_grad():
        for part in parts.values():
            for logits in part.logits:
                logits[torch.rand(logits.shape, generator=generator) < 0.3] = -1

    def rays(draw: int):
        return datamanager.next_train(draw)[0]

    found = dict(zip(parts, model.measure_sensitivity(rays), strict=True))
    assert not model.training  # as it was

    model.train()

    @torch.no_grad()
    def pictures() -> torch.Tensor:
        return torch.cat([model(rays(draw - 8))["rgb"] for draw in range(8)])

    before = pictures()
    for name, level in (
        ("density_planes.0", 1),
        ("density_lines.2", 0),
        ("appearance_planes.1", 0),
        ("appearance_planes.2", 2),
    ):
        values = parts[name].coefficients[level]
        kept = parts[name].logits[level] >= 0
        # Small, so that pixels follow linearly, but not lost in float32.
        step = (1e-8 * 12 / (float(found[name][level]) * int(kept.sum()))) ** 0.5
        original, changes = values.detach().clone(), []
        for _ in range(4):
            noise = step * (torch.rand(values.shape, generator=generator) - 0.5)
            values.data = original + noise
            changes.append((pictures() - before).square().mean())
        values.data = original
        predicted = float(found[name][level]) * step**2 / 12 * int(kept.sum())
        assert 0.5 < float(torch.stack(changes).mean()) / predicted < 2, name
