"""``mwnerf decode`` and ``mwnerf info``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

import masked_wavelet_codec as codec
from masked_wavelet_nerf import report
from masked_wavelet_nerf.errors import UserError


@dataclass
class Decode:
    """Turn a bitstream back into a nerfstudio run, for ns-viewer, ns-render and ns-export.

    The run stands alone: the file's cameras take the place of the capture.
    """

    scene: Annotated[Path, tyro.conf.Positional]
    """The .mwnf file."""
    output_dir: Path
    """Folder of the run: config.yml and the checkpoint go there."""
    data: Path | None = None
    """Folder of the capture, if it is on this machine: ns-eval measures with its photos."""
    levels: int | None = None
    """Detail levels to decode, coarse first, 0 for none: a coarser scene. The first part of a file,
    up to the end of a level, decodes by itself to as many levels as it holds."""

    def main(self) -> None:
        """Decode, write the run, and say how to open it."""
        if self.levels is not None and self.levels < 0:
            raise UserError(f"--levels {self.levels}: expected 0 or more")
        decoded = codec.read(self.scene, levels=self.levels)
        from masked_wavelet_nerf.runs import write_run

        config_path = write_run(decoded, self.output_dir, self.data)
        console = Console()
        console.print(f"[bold green]Wrote {config_path}[/bold green]", soft_wrap=True)
        for command in ("ns-viewer", "ns-render interpolate", "ns-export pointcloud"):
            console.print(f"  {command} --load-config {config_path} …", soft_wrap=True)
        if self.data is None:
            console.print("ns-eval needs the photos: decode again with --data CAPTURE.")
        else:
            console.print(f"  ns-eval --load-config {config_path}", soft_wrap=True)


@dataclass
class Info:
    """Describe a bitstream: bytes by part, kept coefficients by level, and its meta."""

    scene: Annotated[Path, tyro.conf.Positional]
    """The .mwnf file."""
    json: bool = False
    """Print JSON instead of tables."""
    figure: Path | None = None
    """Also draw planes, masks, bits by level and size by part, as a PNG here."""

    def main(self) -> None:
        """Print what the file holds, and draw it."""
        data = self.scene.read_bytes()
        description = codec.describe(data)
        damaged = [s.name for s in description.sections if not s.is_intact]
        if self.json:
            print(json.dumps(report.to_json(description), indent=2))
        else:
            _print_for_people(description)
        if self.figure is not None and not damaged:
            from masked_wavelet_nerf.scene_figure import draw  # matplotlib takes a second

            path = draw(self.figure, codec.decode(data), description)
            Console(stderr=True).print(f"[bold green]Drew {path}[/bold green]", soft_wrap=True)
        if damaged:
            raise codec.CodecError(
                f"section {', '.join(damaged)}: wrong checksum; copy the file anew"
            )


def _print_for_people(description: codec.Description) -> None:
    console = Console()
    meta = description.meta or {}
    for key in ("method", "method_version", "step", "psnr", "author", "licence"):
        if key in meta:
            console.print(f"{key.replace('_', ' ')}: {meta[key]}", highlight=False)
    console.print(f"format: {description.version[0]}.{description.version[1]}", highlight=False)
    console.print(report.tables(description))
