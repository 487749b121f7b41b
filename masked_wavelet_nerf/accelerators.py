"""CUDA libraries in place of plain torch: tiny-cuda-nn's network, nerfacc's marching. Optional.

Each is used where it is installed, the tensors are on CUDA, and it agrees with the plain torch code
beside its caller: that is tried once, on random input, before it is relied on. Whatever fails is
left out, with its reason in :func:`status`. ``MASKED_WAVELET_NATIVE=0`` turns both off, as it does
the compiled CPU loops.

tiny-cuda-nn knows no biases: it serves networks that were made without (``network_biases``).

Letters: R rays, N samples or points, F input features, X, Y, Z occupancy nodes.
"""

from __future__ import annotations

import importlib.util
import textwrap
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from masked_wavelet_nerf import native
from masked_wavelet_nerf.masking import RoundedLinear

_WIDTHS = (16, 32, 64, 128)
"""Hidden widths of tiny-cuda-nn's fully fused networks."""
_PADDING = 16
"""They take inputs and outputs in multiples of this."""
_TOLERANCE = 0.02
"""Half precision against single, relative to the largest output."""

_reasons: dict[str, str] = {}
"""Why a library is not in use, by its name."""


def status() -> str:
    """Which libraries are in use on CUDA, and why not: one line for people."""
    if not _reasons:
        return "CUDA accelerators: tiny-cuda-nn, nerfacc and CUDA graphs are used where they apply."
    return "CUDA accelerators: " + "; ".join(f"{n}: {r}" for n, r in _reasons.items()) + "."


def leave_out(name: str, reason: str) -> None:
    """Has plain torch take a library's place from now on, and :func:`status` say why."""
    _reasons[name] = f"{reason}: plain torch is used"


def first_line(error: Exception) -> str:
    """What people can read of it: what fails to compile comes with pages of the compiler's."""
    return textwrap.shorten(str(error).partition("\n")[0], 200)


def is_left_out(name: str) -> bool:
    """Whether :func:`leave_out` was told so."""
    return name in _reasons


def try_out(network: nn.Sequential, device: torch.device) -> None:
    """Decides now, not at first use, so that :func:`status` can tell."""
    first = network[0]
    assert isinstance(first, nn.Linear)
    run_network(network, torch.zeros(1, first.in_features, device=device))
    marches(torch.zeros(1, 3, device=device), torch.ones(2, 2, 2, dtype=torch.bool, device=device))


# --- networks -------------------------------------------------------------------------------------

_networks: weakref.WeakKeyDictionary[nn.Sequential, nn.Module | None] = weakref.WeakKeyDictionary()


def run_network(network: nn.Sequential, inputs: Float[Tensor, "N F"]) -> Float[Tensor, "N _"]:
    """``network(inputs)``, by tiny-cuda-nn where that is possible.

    Args:
        network: linear layers with ReLUs between them.
        inputs: features.
    """
    if not inputs.is_cuda or not native.is_switched_on():
        return network(inputs)
    if network not in _networks:
        _networks[network] = _fused_network(network, inputs.shape[1])
    fused = _networks[network]
    if fused is None:
        return network(inputs)
    return _run_fused(fused, network, inputs)


def flat_weights(network: nn.Sequential) -> Float[Tensor, " _"]:
    """Weights as tiny-cuda-nn lays them out: row-major, layer after layer, sides padded."""
    rows = []
    layers = [layer for layer in network if isinstance(layer, nn.Linear)]
    for i, layer in enumerate(layers):
        below = -layer.out_features % _PADDING if i == len(layers) - 1 else 0
        right = -layer.in_features % _PADDING if i == 0 else 0
        weight = layer.used()[0] if isinstance(layer, RoundedLinear) else layer.weight
        rows.append(F.pad(weight, (0, right, 0, below)).flatten())
    return torch.cat(rows)


def _fused_network(network: nn.Sequential, num_inputs: int) -> nn.Module | None:
    layers = [layer for layer in network if isinstance(layer, nn.Linear)]
    widths = {layer.out_features for layer in layers[:-1]}
    try:
        import tinycudann  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError) as error:
        return leave_out("tiny-cuda-nn", f"not installed ({first_line(error)})")
    if any(layer.bias is not None for layer in layers):
        return leave_out("tiny-cuda-nn", "needs --pipeline.model.network-biases False")
    if len(widths) != 1 or not widths <= set(_WIDTHS):
        return leave_out("tiny-cuda-nn", f"needs a hidden width of {_WIDTHS}, not {widths}")
    try:
        fused = tinycudann.Network(
            num_inputs,
            layers[-1].out_features,
            {
                "otype": "FullyFusedMLP",
                "activation": "ReLU",
                "output_activation": "None",
                "n_neurons": widths.pop(),
                "n_hidden_layers": len(layers) - 1,
            },
        )
        with torch.no_grad():
            trial = torch.rand(256, num_inputs, device=layers[0].weight.device)
            expected, found = network(trial), _run_fused(fused, network, trial)
        error = float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-6))
    except RuntimeError as error:  # an unsupported GPU, or another layout of weights
        return leave_out("tiny-cuda-nn", f"does not run here ({first_line(error)})")
    if not error < _TOLERANCE:
        return leave_out("tiny-cuda-nn", f"disagrees with plain torch by {error:.1%}")
    return fused


def _run_fused(fused: nn.Module, network: nn.Sequential, inputs: Tensor) -> Tensor:
    # The weights stay our own parameters: they are what is trained, saved and exported.
    parameters = {"params": flat_weights(network)}
    return torch.func.functional_call(fused, parameters, (inputs,)).to(inputs.dtype)


# --- marching -------------------------------------------------------------------------------------

_marching_agrees: dict[torch.device, bool] = {}


def marches(origins: Float[Tensor, "R 3"], cells: Bool[Tensor, "X Y Z"]) -> bool:
    """Whether nerfacc marches these rays; an occupancy that is not known yet skips nothing."""
    if not origins.is_cuda or min(cells.shape) < 2 or not native.is_switched_on():
        return False
    device = origins.device
    if device not in _marching_agrees:
        _marching_agrees[device] = _try_marching(device)
    return _marching_agrees[device]


def occupied_samples(
    origins: Float[Tensor, "R 3"],
    directions: Float[Tensor, "R 3"],
    first: Float[Tensor, "R 1"],
    fars: Float[Tensor, "R 1"],
    step_size: float,
    cells: Bool[Tensor, "X Y Z"],
) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
    """Ray and distance of the places first + s · step < far in occupied cells of [-1, 1]³."""
    from nerfacc import traverse_grids

    # A node stands for the cell around it: the grid of cells ends half a cell outside the nodes.
    nodes = torch.tensor(cells.shape, dtype=origins.dtype).to(cells.device, non_blocking=True)
    corner = 1 + 1 / (nodes - 1)
    _, samples = traverse_grids(
        origins,
        directions,
        cells[None],
        torch.cat((-corner, corner))[None],
        near_planes=first[:, 0] - step_size / 2,  # it samples the middle of each step
        far_planes=fars[:, 0],
        step_size=step_size,
    )
    return samples.ray_indices.long(), samples.vals  # pyright: ignore[reportOptionalMemberAccess]


def _has_nerfacc_kernels() -> bool:
    if importlib.util.find_spec("nerfacc.csrc") is not None:  # built with the package
        return True
    from torch.utils import cpp_extension  # which has a word to say where there is no CUDA

    built = cpp_extension._get_build_directory("nerfacc_cuda", verbose=False)
    return Path(built, "nerfacc_cuda.so").exists()


def _try_marching(device: torch.device) -> bool:
    if not _has_nerfacc_kernels():
        # To compile them takes minutes, and every time anew where it fails.
        how = 'python -c "import nerfacc.cuda._backend" does so once'
        leave_out("nerfacc", f"its kernels are not compiled ({how})")
        return False

    def compare() -> float:
        generator = torch.Generator().manual_seed(0)
        cells = (torch.rand(8, 9, 10, generator=generator) < 0.4).to(device)
        origins = (torch.rand(64, 3, generator=generator) * 2 - 1).to(device)
        directions = F.normalize(torch.randn(64, 3, generator=generator), dim=-1).to(device)
        first = torch.rand(64, 1, generator=generator).to(device) * 0.1
        index = torch.arange(100, device=device)
        middles = first + index * 0.05
        points = origins[:, None] + directions[:, None] * middles[..., None]
        nodes = torch.tensor(cells.shape, device=device)
        nearest = ((points + 1) * ((nodes - 1) / 2)).round().long()
        inside = ((nearest >= 0) & (nearest < nodes)).all(dim=-1) & (middles < 3.0)
        x, y, z = nearest.minimum(nodes - 1).clamp(min=0).unbind(dim=-1)
        expected = (cells[x, y, z] & inside).sum(dim=1)
        ray, _ = occupied_samples(
            origins, directions, first, torch.full_like(first, 3.0), 0.05, cells
        )
        found = torch.bincount(ray, minlength=64)
        return float((expected - found).abs().sum() / expected.sum())

    return _passes("nerfacc", compare)


def _passes(name: str, compare: Callable[[], float]) -> bool:
    try:
        difference = compare()
    except (ImportError, RuntimeError, AttributeError) as error:
        leave_out(name, f"does not run here ({first_line(error)})")
        return False
    if not difference < _TOLERANCE:
        leave_out(name, f"disagrees with plain torch by {difference:.1%}")
        return False
    return True
