"""Scenes on disk."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from masked_wavelet_codec.codec import DEFAULT_SIZE_LIMIT, decode, encode
from masked_wavelet_codec.errors import CodecError
from masked_wavelet_codec.scene import Scene

__all__ = ["read", "write"]

_PIECE_BYTES = 2**20


def read(
    path: str | os.PathLike[str],
    *,
    levels: int | None = None,
    size_limit: int = DEFAULT_SIZE_LIMIT,
) -> Scene:
    """Decode the file at ``path``, or its first detail levels: see ``decode``.

    Raises:
        OSError: if it cannot be read.
        CodecError: if it is not a scene, or larger than ``size_limit`` (see ``decode``).
    """
    with open(path, "rb") as file:
        # Piece by piece: a pipe or device states no size, and one large read takes all at once.
        data = bytearray()
        while len(data) <= size_limit and (piece := file.read(_PIECE_BYTES)):
            data += piece
    if len(data) > size_limit:
        raise CodecError(
            f"container: {os.fspath(path)!r} is larger than the size limit {size_limit}"
        )
    return decode(bytes(data), levels=levels, size_limit=size_limit)


def write(path: str | os.PathLike[str], scene: Scene, profile: str = "range") -> int:
    """Encode ``scene`` into the file at ``path``, all or nothing.

    The bytes go to a new name in the same folder and are on the disk before they take the place of
    an older file; a symbolic link is followed.

    Returns:
        Size of the file in bytes.

    Raises:
        CodecError: if the scene cannot be encoded.
        OSError: if the file cannot be written. In both cases an older file stays as it was, and no
            other file is left.
    """
    data = encode(scene, profile)
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return len(data)
