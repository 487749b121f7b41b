"""The export command: ``ns-export masked-wavelet`` and ``mwnerf export``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from nerfstudio.utils.rich_utils import CONSOLE

import masked_wavelet_codec as codec
from masked_wavelet_nerf import recode, report
from masked_wavelet_nerf.runs import Evaluation, Run, evaluate, open_run
from masked_wavelet_nerf.scene import load_scene_into, stored_occupancy

ProfileName = Literal["range", "paper"]


@dataclass
class ExportMaskedWavelet:
    """Write a trained masked-wavelet run as a compressed bitstream.

    The file holds all that viewing, rendering and evaluating needs, without the photos:
    mwnerf decode turns it back into a run, mwnerf info describes it.
    """

    load_config: Path
    """Path to the config YAML file."""
    output_dir: Path
    """Path to the output directory."""
    filename: str = "scene.mwnf"
    """Name of the file in it."""
    profile: ProfileName = "range"
    """How the scene is coded. range: every coefficient knowing what came before it, networks as
    integers. paper: the paper's pipeline (run lengths, Huffman, raw floats), for comparison: twice
    as large."""
    allowed_loss: float = 0.0
    """dB of PSNR that may be given for fewer bytes: every band gets coarser quantiser steps, as far
    as test views allow. 0 keeps those of training. Needs the capture, and a minute."""
    data: Path | None = None
    """Where the capture is now, if not where the run was trained from."""
    evaluate: bool = True
    """Measure PSNR before and after, where the capture is at hand."""
    licence: str | None = None
    """Licence of the scene, written into the file."""
    author: str | None = None
    """Author of the scene, written into the file."""

    def main(self) -> None:
        """Export, and print what the file holds."""
        run = open_run(self.load_config, self.data)
        if run.pipeline is None:
            CONSOLE.print(
                "[yellow]The capture is not at hand, so PSNR is not measured and the file holds no "
                f"cameras; --data says where it is. ({run.missing})"
            )
        pipeline = run.measurable if self.evaluate else None
        before = evaluate(pipeline) if pipeline else None
        exported = before
        if self.allowed_loss > 0:
            recode.coarsen(run, self.allowed_loss)
            exported = evaluate(pipeline) if pipeline else None
        path, description = export_run(
            run,
            self.output_dir / self.filename,
            profile=self.profile,
            psnr=exported.psnr if exported else None,
            notes={"licence": self.licence, "author": self.author},
        )
        CONSOLE.print(report.tables(description))
        if before is not None:
            after = evaluate_decoded(run, path)
            CONSOLE.print(
                f"PSNR over {before.num_views} views: {before.psnr:.3f} dB before, "
                f"{after.psnr:.3f} dB after decoding ({after.psnr - before.psnr:+.4f} dB)"
            )
        CONSOLE.print(f"[bold green]Wrote {path}[/bold green]", soft_wrap=True)


def export_run(
    run: Run,
    path: Path,
    *,
    profile: ProfileName = "range",
    psnr: float | None = None,
    notes: dict[str, str | None] | None = None,
) -> tuple[Path, codec.Description]:
    """Writes the bitstream of an opened run; a failure leaves an older file as it was.

    Args:
        run: an opened run.
        path: the file.
        profile: see :class:`ExportMaskedWavelet`.
        psnr: mean PSNR of the model now, dB; written into the file.
        notes: further entries of the file's meta; None is left out.

    Raises:
        OSError: if the file cannot be written.
    """
    meta: dict[str, Any] = {k: v for k, v in (notes or {}).items() if v is not None}
    if psnr is not None:
        meta["psnr"] = round(psnr, 4)
    scene = run.scene(meta)
    if profile == "paper":  # as it is there: floats, those that integers stand for, and all cells
        networks = {
            name: array.to_floats() if isinstance(array, codec.QuantisedArray) else array
            for name, array in scene.networks.items()
        }
        every_cell = stored_occupancy(run.model.occupancy)
        scene = replace(scene, networks=networks, occupancy=every_cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    codec.write(path, scene, profile)
    return path, codec.describe(path.read_bytes())


@torch.no_grad()
def evaluate_decoded(run: Run, path: Path) -> Evaluation:
    """Decodes the file into the run's model and evaluates that."""
    assert run.pipeline is not None
    load_scene_into(run.model, codec.read(path))
    run.model.refresh()
    return evaluate(run.pipeline)
