"""Masked wavelet planes: compact radiance fields for nerfstudio."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("masked-wavelet-nerf")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0.0.0"
