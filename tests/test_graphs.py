"""CUDA graphs: compared where CUDA exists; when they are recorded anew, by a stand-in."""

from __future__ import annotations

import pytest
import torch

from masked_wavelet_nerf import accelerators, graphs, native
from masked_wavelet_nerf.field import FieldConfig, WaveletPlaneField
from masked_wavelet_nerf.masking import USUAL_PRICE

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def forget_reasons(monkeypatch):
    monkeypatch.setattr(accelerators, "_reasons", {})


def small_field(device: str = "cpu") -> WaveletPlaneField:
    config = FieldConfig(num_density_components=2, num_appearance_components=3, num_levels=2)
    field = WaveletPlaneField(config, (9, 12, 14)).to(device)
    for grid in field.grids().values():
        for some in grid.logits:
            torch.nn.init.normal_(some)
    return field


def parameters_of(field: WaveletPlaneField) -> list[torch.nn.Parameter]:
    return [p for g in field.grids().values() for p in (*g.coefficients, *g.logits)]


def step(field: WaveletPlaneField) -> tuple[torch.Tensor, ...]:
    """Copies of all that a training step sees: planes, lines, counts, sum of logits, gradients."""
    spatial = field.to_spatial()
    shown = [t for grid in (spatial.density, spatial.appearance) for kind in grid for t in kind]
    logits = [some for grid in field.grids().values() for some in grid.logits]
    total = spatial.logit_sum
    if total is None:  # plain torch, which takes it of the logits themselves
        prices = [p for g in field.grids().values() for p in g.prices or [USUAL_PRICE] * 3]
        total = sum((m * w).sum() for m, w in zip(logits, prices, strict=False)) / USUAL_PRICE
    loss = sum((t.square() * (k + 1)).sum() for k, t in enumerate(shown)) - 0.3 * total
    gradients = torch.autograd.grad(loss, parameters_of(field))
    return tuple(t.detach().clone() for t in (*shown, *spatial.kept, total, *gradients))


def assert_equal(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(found, expected, strict=True):
        if a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()) + 1e-6)
        else:
            assert torch.equal(a, b)


def train_a_little(field: WaveletPlaneField, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters_of(field):
            p += 0.1 * torch.randn(p.shape, generator=generator).to(p.device)


def changes(field: WaveletPlaneField):
    """What happens to a field in training, by whether the recording of before still serves."""
    grid = field.grids()["appearance_planes.1"]
    yield True, lambda: train_a_little(field, 1)
    yield False, lambda: field.upsample((11, 14, 17))
    yield True, lambda: train_a_little(field, 2)
    yield False, lambda: field.crop((1, 0, 2), (10, 14, 17))
    yield False, lambda: grid.set_largest([3, 7, 15])
    prices = [torch.full(v.shape, 7 * (n + 1)) for n, v in enumerate(grid.coefficients)]
    yield (
        False,
        lambda: [
            g.set_prices([torch.full(v.shape, 60) for v in g.coefficients])
            for g in field.grids().values()
        ],
    )
    yield False, lambda: grid.set_prices(prices)
    yield True, lambda: train_a_little(field, 3)


def test_recordings_serve_until_what_they_depend_on_changes(monkeypatch):
    recorded = []

    def stand_in(compute, parameters):
        recorded.append(compute)
        return compute

    monkeypatch.setattr(graphs, "serve", lambda parameters: True)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", stand_in)
    with native.disabled():
        field = small_field()
        step(field)
        assert len(recorded) == 1
        for serves, change in changes(field):
            before = len(recorded)
            change()
            found = step(field)
            assert len(recorded) == before + (not serves)
            with monkeypatch.context() as plain:
                plain.setattr(graphs, "serve", lambda parameters: False)
                assert_equal(found, step(field))


def test_what_cannot_be_recorded_is_computed_and_says_so(monkeypatch):
    def fails(compute, parameters):
        raise RuntimeError("no such luck\nand a page of compiler output")

    with native.disabled():
        field = small_field()
        expected = step(field)
        monkeypatch.setattr(graphs, "serve", lambda parameters: True)
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", fails)
        assert_equal(step(field), expected)
    assert "CUDA graphs: cannot be recorded here (no such luck)" in accelerators.status()
    assert "compiler output" not in accelerators.status()


def test_on_the_cpu_nothing_is_recorded():
    assert not graphs.serve(parameters_of(small_field()))


@needs_cuda
def test_replays_equal_plain_torch():
    field = small_field("cuda")
    assert graphs.serve(parameters_of(field))
    step(field)
    for _, change in changes(field):
        change()
        found = step(field)
        with native.disabled():
            assert_equal(found, step(field))
    assert not accelerators.is_left_out("CUDA graphs"), accelerators.status()


@needs_cuda
def test_gradients_that_are_added_up_are_not_overwritten():
    field = small_field("cuda")
    logits = field.grids()["density_planes.0"].logits[0]

    def backward():
        spatial = field.to_spatial()
        (spatial.density.planes[0].square().sum() + spatial.logit_sum).backward()

    backward()
    once = logits.grad.clone()
    backward()
    torch.testing.assert_close(logits.grad, 2 * once)
    assert float(once.abs().max()) > 0
    logits.grad = None
    with torch.no_grad():
        assert not graphs.serve(parameters_of(field))
