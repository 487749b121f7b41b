"""Errors that a user can cause: one readable line, no traceback, exit code 2."""

import sys

from masked_wavelet_codec import CodecError


class UserError(ValueError):
    """Names what is wrong, what was expected and what to do."""


class FatalError(UserError, SystemExit):
    """Ends a nerfstudio command with its message and exit code 1, for those catch nothing."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = message


class RefusedFileError(CodecError, SystemExit):
    """Ends a nerfstudio command because of a file: says why, exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        print(message, file=sys.stderr)
        self.code = 2
