"""Masked wavelet planes: compact radiance fields for nerfstudio."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from masked_wavelet_nerf.loading import Camera, LoadedScene, load_scene

__all__ = ["Camera", "LoadedScene", "load_scene"]

try:
    __version__ = version("masked-wavelet-nerf")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0.0.0"


def __getattr__(name: str) -> Any:
    # Not before it is asked for: torch takes seconds to import, and commands want none of it.
    if name in __all__:
        from masked_wavelet_nerf import loading

        return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
