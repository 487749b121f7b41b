"""Tables of results: what each entry came to, and how its curves compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from masked_wavelet_nerf.curves import Point, bjontegaard_psnr, bjontegaard_rate
from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.markdown import table
from masked_wavelet_nerf.summary import Entry, curves_of


class Comparison(NamedTuple):
    """A curve against the reference; where a number cannot be had, why."""

    curve: str
    rate: str
    """Bytes more or less at the same PSNR."""
    psnr: str
    """PSNR more or less at the same bytes."""


def compare(entries: Sequence[Entry], reference: str | None = None) -> tuple[str, list[Comparison]]:
    """Bjøntegaard's differences of every curve to the reference, the first one if not named.

    A single point is no curve.

    Raises:
        UserError: if there is no such curve.
    """
    curves = {name: points for name, points in curves_of(entries).items() if len(points) > 1}
    if not curves and reference is None:
        return "", []
    name = reference or next(iter(curves))
    if name not in curves:
        raise UserError(f"--reference {name!r}: no such curve; there are {', '.join(curves)}")
    found = []
    for other, points in curves.items():
        if other != name:
            rate = _difference(bjontegaard_rate, curves[name], points, "+.1%", "")
            psnr = _difference(bjontegaard_psnr, curves[name], points, "+.2f", " dB")
            found.append(Comparison(other, rate, psnr))
    return name, found


def _difference(
    measure: Callable[[Sequence[Point], Sequence[Point]], float],
    reference: Sequence[Point],
    other: Sequence[Point],
    form: str,
    unit: str,
) -> str:
    try:
        return f"{measure(reference, other):{form}}{unit}"
    except UserError as error:
        return f"– ({error})"


def result_rows(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of results."""
    with_scenes = any(len(entry.scenes) > 1 for entry in entries)
    with_paper = any(
        row.get("paper") or row.get("paper_mean") for entry in entries for row in entry.rows
    )
    header = ["", "PSNR", "bytes", "SSIM", "dropped", "minutes", "rays/s", "seeds"]
    header += ["scenes"] if with_scenes else []
    header += ["paper"] if with_paper else []
    lines = []
    for entry in entries:
        spread, seconds = entry.spread("psnr_after"), entry.mean("train_seconds")
        line = [
            entry.name,
            _shown(entry.mean("psnr_after"), ".2f")
            + ("" if spread is None else f" ± {spread:.2f}"),
            _shown(entry.mean("bytes"), ",.0f"),
            _shown(entry.mean("ssim"), ".4f"),
            _shown(entry.mean("dropped"), ".1%"),
            "–" if seconds is None else f"{seconds / 60:.1f}",
            _shown(entry.mean("render_rays_per_second"), ",.0f"),
            ", ".join(map(str, entry.seeds)),
        ]
        line += [", ".join(entry.scenes)] if with_scenes else []
        line += [_papers(entry)] if with_paper else []
        lines.append(line)
    return header, lines


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _papers(entry: Entry) -> str:
    """Published numbers: means over the entry's scenes, or else over all scenes there are."""
    papers = list({row["scene"]: row.get("paper", {}) for row in entry.rows}.values())
    over = ""
    if not all(papers):
        papers, over = [entry.rows[0].get("paper_mean", {})], " (all scenes)"
    words = []
    for key, form, unit in (("psnr", ".2f", " dB"), ("megabytes", ".3f", " MB")):
        if all(key in paper for paper in papers):
            words.append(f"{sum(paper[key] for paper in papers) / len(papers):{form}}{unit}")
    return ", ".join(words) + over if words else "–"


def to_markdown(entries: Sequence[Entry], reference: str | None = None) -> str:
    """Tables of results and of Bjøntegaard's differences."""
    text = table(*result_rows(entries))
    name, comparisons = compare(entries, reference)
    if comparisons:
        header = ["curve", f"bytes at the PSNR of {name}", "PSNR at its bytes"]
        text += "\n" + table(header, [list(comparison) for comparison in comparisons])
    return text
