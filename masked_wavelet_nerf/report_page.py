"""``mwnerf report``: rows of results as tables, and as a page that stands alone."""

from __future__ import annotations

import base64
import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import jinja2
import tyro
from nerfstudio.utils.rich_utils import CONSOLE

from masked_wavelet_nerf import doc_tables, result_figures
from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.files import replace_file
from masked_wavelet_nerf.report_tables import compare, result_rows, to_markdown
from masked_wavelet_nerf.summary import Entry, read_entries

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PICTURE = "side_by_side.png"
_FIGURES = (".png", ".svg", ".pdf")


@dataclass
class Report:
    """Turn rows of results into tables, rate-distortion curves, and a page.

    Rows of the same preset, variant and place in a sweep are one line: means over scenes and seeds.
    Curves: a sweep's variants, or else all rows of a file. Bjøntegaard's difference compares them
    with the first one.
    """

    rows: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Files that mwnerf bench --rows wrote."""
    html: Path | None = None
    """Write a page here: tables, curves, what is kept of each level, training, pictures. It needs
    no other file."""
    markdown: Path | None = None
    """Write the tables here."""
    figure: Path | None = None
    """Draw the rate-distortion curves here."""
    perception: Path | None = None
    """Draw the curves of bytes against SSIM here."""
    runs: Path | None = None
    """Folder that mwnerf bench --output-dir left, for pictures in the page."""
    reference: str | None = None
    """Name of the curve that the others are compared with."""
    tables: Path | None = None
    """TOML file that says which tables of which documents come from rows: writes them anew."""

    def main(self) -> None:
        """Print, and write what is asked for."""
        if not self.rows and self.tables is None:
            raise UserError("report: expected files of rows, or --tables")
        drawn = {"--figure": self.figure, "--perception": self.perception}
        asked = {"--html": self.html, "--markdown": self.markdown, **drawn}
        if not self.rows and any(asked.values()):
            flags = ", ".join(flag for flag, path in asked.items() if path)
            raise UserError(f"report: {flags} of which rows? Give files of rows")
        for flag, path in drawn.items():
            if path is not None and path.suffix not in _FIGURES:
                raise UserError(f"{flag} {path}: expected one of {', '.join(_FIGURES)}")
        if self.tables is not None:
            for path in doc_tables.update(self.tables):
                CONSOLE.print(f"Wrote the tables of {path}")
        if not self.rows:
            return
        entries = read_entries(self.rows)
        text = to_markdown(entries, self.reference)
        print(text)
        if self.markdown is not None:
            self._put(self.markdown, lambda path: path.write_text(text, "utf8"))
        if self.figure is not None:
            self._put_figure(self.figure, result_figures.rate_distortion(entries))
        if self.perception is not None:
            figure = result_figures.rate_perception(entries)
            if figure is None:
                raise UserError(f"--perception {self.perception}: no row says its SSIM")
            self._put_figure(self.perception, figure)
        if self.html is not None:
            page = to_html(entries, self.reference, self.runs)
            self._put(self.html, lambda path: path.write_text(page, "utf8"))

    def _put_figure(self, path: Path, figure: Figure) -> None:
        kind = path.suffix[1:]
        self._put(path, lambda path: figure.savefig(path, dpi=150, format=kind))

    def _put(self, path: Path, write: Callable[[Path], object]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, write)
        CONSOLE.print(f"Wrote {path}", markup=False, highlight=False, soft_wrap=True)


def to_html(
    entries: Sequence[Entry], reference: str | None = None, runs: Path | None = None
) -> str:
    """A page with everything in it: no scripts, nothing from elsewhere."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("masked_wavelet_nerf", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    header, lines = result_rows(entries)
    name, comparisons = compare(entries, reference)
    figures = [
        ("Bytes against PSNR", result_figures.rate_distortion(entries)),
        ("Bytes against SSIM", result_figures.rate_perception(entries)),
        ("What is kept of each level", result_figures.kept_levels(entries)),
        ("Training", result_figures.training(entries)),
    ]
    return environment.get_template("report.html").render(
        date=datetime.date.today().isoformat(),
        header=header,
        lines=lines,
        reference=name,
        comparisons=comparisons,
        figures=[(title, result_figures.to_svg(f)) for title, f in figures if f is not None],
        pictures=_pictures(entries, runs),
        origins=[_origin(entry) for entry in entries],
    )


def _pictures(entries: Sequence[Entry], runs: Path | None) -> list[tuple[str, str]]:
    """Caption and picture of each entry, of the first run that is at hand."""
    if runs is None:
        return []
    found = []
    for entry in entries:
        for row in entry.rows:
            path = runs / row.get("experiment", "") / entry.export / _PICTURE
            if row.get("experiment") and path.is_file():
                caption = f"{entry.name}: {row['psnr_after']:.2f} dB, {row['bytes']:,} bytes"
                found.append((caption, base64.b64encode(path.read_bytes()).decode()))
                break
    return found


def _origin(entry: Entry) -> dict[str, Any]:
    row = entry.rows[0]
    machine = row.get("machine", {})
    return {
        "name": entry.name,
        "command": row.get("command", ""),
        "commit": row.get("commit") or "",
        "machine": ", ".join(str(v) for v in (row.get("device"), *machine.values()) if v),
        "versions": ", ".join(f"{k} {v}" for k, v in row.get("versions", {}).items()),
        "configuration": row.get("configuration", {}),
    }
