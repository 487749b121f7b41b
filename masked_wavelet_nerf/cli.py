"""``mwnerf``: what nerfstudio's own commands have no place for."""

from __future__ import annotations

import importlib
import sys

import tyro
from rich.console import Console
from rich.table import Table

from masked_wavelet_codec import CodecError
from masked_wavelet_nerf.errors import RefusedFileError, UserError

# Only the chosen command's module is imported: nerfstudio takes seconds to load.
COMMANDS = {
    "check": (
        "masked_wavelet_nerf.check",
        "Check",
        "what a capture is, what is wrong with it, how to train on it",
    ),
    "demo": ("masked_wavelet_nerf.demo", "Demo", "train, export and decode a small sample scene"),
    "export": ("masked_wavelet_nerf.export", "ExportMaskedWavelet", "write a run as a bitstream"),
    "decode": ("masked_wavelet_nerf.decode", "Decode", "turn a bitstream back into a run"),
    "view": ("masked_wavelet_nerf.view", "View", "look at a bitstream in the browser"),
    "info": ("masked_wavelet_nerf.decode", "Info", "describe a bitstream"),
    "bench": (
        "masked_wavelet_nerf.bench",
        "Bench",
        "measure presets from training to decoding, over scenes and seeds",
    ),
    "report": (
        "masked_wavelet_nerf.report_page",
        "Report",
        "tables, curves and a page of what bench measured",
    ),
    "peers": (
        "masked_wavelet_nerf.peers",
        "Peers",
        "train other nerfstudio methods beside ours on one capture",
    ),
    "profile": (
        "masked_wavelet_nerf.profiling",
        "Profile",
        "where the time of a step and of a frame goes",
    ),
    "preset": ("masked_wavelet_nerf.presets", "ShowPreset", "print a preset's ns-train command"),
}


def main(arguments: list[str]) -> int:
    """Runs one command.

    Returns:
        0, or what the command returns; 2 after an error that the user can mend.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_help()
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        return _fail(f"unknown command {name!r}; expected one of {', '.join(COMMANDS)}")
    module, attribute, _ = COMMANDS[name]
    command = getattr(importlib.import_module(module), attribute)
    parsed = tyro.cli(command, prog=f"mwnerf {name}", args=rest)
    try:
        return parsed.main() or 0
    except RefusedFileError:  # which has said so itself
        return 2
    except (UserError, CodecError, OSError) as error:
        return _fail(f"{name}: {error}")


def _print_help() -> None:
    table = Table(title="mwnerf COMMAND --help says more", box=None, title_justify="left")
    table.add_column("command")
    table.add_column("")
    for name, (_, _, summary) in COMMANDS.items():
        table.add_row(name, summary)
    Console().print(table)


def _fail(message: str) -> int:
    console = Console(stderr=True)
    console.print(f"mwnerf {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    return 2


def entrypoint() -> None:
    """Console script."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    entrypoint()
