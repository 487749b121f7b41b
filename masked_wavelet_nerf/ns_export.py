"""Puts ``masked-wavelet`` among the subcommands of ``ns-export``.

nerfstudio 1.1.5 has no way in: the subcommands are a fixed union in its ``scripts.exporter``.
That module imports ``tyro`` first and discovers plugins after, so when a plugin loads, the module's
``tyro`` attribute can be replaced by a stand-in that adds one subcommand to the union given to
``tyro.cli`` and passes everything else through. Only that one module's attribute is touched. If
anything looks different from what is known, nothing is done: ``mwnerf export`` is the same command.
"""

from __future__ import annotations

import sys
import typing
from types import ModuleType

_EXPORTER = "nerfstudio.scripts.exporter"


class _TyroStandIn:
    """``tyro`` as seen by the exporter: ``cli`` knows one more subcommand."""

    def __init__(self, tyro: ModuleType) -> None:
        self._tyro = tyro

    def __getattr__(self, name: str) -> typing.Any:
        return getattr(self._tyro, name)

    def cli(self, commands: typing.Any, *args: typing.Any, **kwargs: typing.Any) -> typing.Any:
        """``tyro.cli`` with our subcommand in the union."""
        return self._tyro.cli(_with_our_command(self._tyro, commands), *args, **kwargs)


def _with_our_command(tyro: typing.Any, commands: typing.Any) -> typing.Any:
    union, *markers = typing.get_args(commands) or (None,)
    subcommands = typing.get_args(union)
    if typing.get_origin(union) is not typing.Union or not subcommands:
        return commands
    from masked_wavelet_nerf.export import ExportMaskedWavelet

    ours = typing.Annotated[ExportMaskedWavelet, tyro.conf.subcommand(name="masked-wavelet")]
    extended = typing.Union[(*subcommands, ours)]
    return typing.Annotated[(extended, *markers)]


def install() -> None:
    """Adds the subcommand if ``ns-export`` is what is being started. Never raises."""
    exporter = sys.modules.get(_EXPORTER)
    main = sys.modules.get("__main__")
    if exporter is None and getattr(getattr(main, "__spec__", None), "name", None) == _EXPORTER:
        exporter = main  # python -m nerfstudio.scripts.exporter
    tyro = getattr(exporter, "tyro", None)
    if isinstance(tyro, ModuleType) and hasattr(tyro, "cli") and hasattr(tyro, "conf"):
        exporter.tyro = _TyroStandIn(tyro)  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
