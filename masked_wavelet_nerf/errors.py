"""Errors that a user can cause: one readable line, no traceback, exit code 2."""


class UserError(ValueError):
    """Names what is wrong, what was expected and what to do."""
