"""The bitstream of masked-wavelet scenes: ``Scene`` to bytes and back.

Needs numpy and constriction (an entropy coder), neither torch nor nerfstudio. The format is
described in ``export/FORMAT.md``.
"""

from masked_wavelet_codec.codec import DEFAULT_SIZE_LIMIT, decode, encode
from masked_wavelet_codec.coefficients import Measured, measure
from masked_wavelet_codec.description import Description, LevelInfo, SectionInfo, describe
from masked_wavelet_codec.errors import CodecError
from masked_wavelet_codec.files import read, write
from masked_wavelet_codec.poses import round_poses
from masked_wavelet_codec.scene import Band, Cameras, Grid, QuantisedArray, Scene, equal

__all__ = [
    "DEFAULT_SIZE_LIMIT",
    "Band",
    "Cameras",
    "CodecError",
    "Description",
    "Grid",
    "LevelInfo",
    "Measured",
    "QuantisedArray",
    "Scene",
    "SectionInfo",
    "decode",
    "describe",
    "encode",
    "equal",
    "measure",
    "read",
    "round_poses",
    "write",
]
