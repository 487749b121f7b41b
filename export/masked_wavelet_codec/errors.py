"""The one exception of this package."""

__all__ = ["CodecError"]


class CodecError(ValueError):
    """A scene that cannot be written, or bytes that are not a scene.

    The message names the field (while encoding) or the section (while decoding) first, then the
    reason. Decoding raises nothing else, whatever the bytes are.
    """
