"""Tables of documents that are made of rows of results, as a TOML file says.

    [NAME]                      the table between ``<!-- table NAME -->`` and ``<!-- end -->``
    file = "../README.md"       the document, relative to the TOML file
    columns = ["", "PSNR", …]   header
    [[NAME.rows]]
    cells = ["this", "**{psnr:.2f} dB**", "{bytes:,.0f}"]
    results = "results/presets.jsonl"             where {…} comes from, relative to the TOML file
    where = { preset = "lego_100_best" }          which of its rows: their mean

    [OTHER]                     what ``mwnerf report`` prints of files of rows
    file = "experiments.md"
    report = ["results/sample_ablations.jsonl"]
    reference = "wavelet"       the curve that others are compared with

A cell may ask for any number of a row, and for ``psnr`` (decoded, dB), ``kept`` (share),
``minutes`` (of training), ``seeds``, ``every`` (PSNR seed by seed) and ``every_bytes``. Cells of
rows without ``results`` stand as they are: published numbers.
"""

from __future__ import annotations

import re
import string
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.files import replace_file
from masked_wavelet_nerf.markdown import table
from masked_wavelet_nerf.report_tables import to_markdown
from masked_wavelet_nerf.results import Row, read_rows
from masked_wavelet_nerf.summary import Entry, read_entries

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


_KINDS = ("file", "columns", "rows"), ("file", "report", "reference")
_STRINGS, _LISTS = {"file", "reference"}, {"columns", "report"}


def update(spec: Path) -> list[Path]:
    """Writes all tables of a TOML file into their documents.

    Returns:
        The documents.

    Raises:
        UserError: if the file, a document or rows are not what they should be; documents are then
            as they were.
    """
    documents: dict[Path, str] = {}
    for name, description in _read(spec).items():
        path = (spec.parent / description["file"]).resolve()
        try:
            text = documents.get(path) or path.read_text("utf8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{spec}: [{name}] file: {path}: {error}") from error
        try:
            rendered = _render(spec.parent, description)
        except UserError as error:
            raise UserError(f"{spec}: [{name}]{error}") from error
        documents[path] = _put(text, name, rendered, path)
    for path, text in documents.items():
        replace_file(path, lambda temporary, text=text: temporary.write_text(text, "utf8"))
    return list(documents)


def _read(spec: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(spec.read_text("utf8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{spec}: expected a TOML file of tables ({error})") from error
    for name, description in content.items():
        if not isinstance(description, dict) or set(description) not in map(set, _KINDS):
            kinds = ", or ".join(f"{', '.join(kind[:-1])} and {kind[-1]}" for kind in _KINDS)
            raise UserError(f"{spec}: [{name}]: expected {kinds}")
        for key in _STRINGS & set(description):
            if not isinstance(description[key], str):
                raise UserError(f"{spec}: [{name}] {key}: expected text in quotes")
        for key in _LISTS & set(description):
            values = description[key]
            if not (isinstance(values, list) and values and all(type(v) is str for v in values)):
                raise UserError(f"{spec}: [{name}] {key}: expected a list of texts")
    return content


def _put(text: str, name: str, rendered: str, path: Path) -> str:
    begin, end = f"<!-- table {name} -->\n", "<!-- end -->"
    pattern = re.escape(begin) + r"(?:(?!<!-- table ).)*?" + re.escape(end)
    found = re.findall(pattern, text, re.DOTALL)
    if len(found) != 1 or text.count(begin) != 1:
        raise UserError(f"{path}: expected one {begin.strip()} … {end}, found {len(found)}")
    return text.replace(found[0], f"{begin}\n{rendered}\n{end}")


def _render(folder: Path, description: Mapping[str, Any]) -> str:
    """The table.

    Raises:
        UserError: where and why not, to be put behind the table's name.
    """
    if "report" in description:
        try:
            entries = read_entries([folder / path for path in description["report"]])
            return to_markdown(entries, description["reference"])
        except UserError as error:
            raise UserError(f": {error}") from error
    lines = []
    for number, line in enumerate(description["rows"], 1):
        try:
            lines.append(_cells(folder, line))
        except (UserError, KeyError, ValueError, TypeError, IndexError) as error:
            why = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            raise UserError(f" row {number}: {why}") from error
    try:
        return table(description["columns"], lines)
    except ValueError as error:
        raise UserError(f": {error}") from error


def _cells(folder: Path, line: Mapping[str, Any]) -> list[str]:
    cells, where = line["cells"], line.get("where", {})
    if not all(isinstance(cell, str) for cell in cells):
        raise TypeError("cells: expected texts in quotes")
    if not isinstance(where, Mapping):
        raise TypeError("where: expected { key = value }")
    if "results" not in line:
        return cells
    path = folder / line["results"]
    rows = [row for row in read_rows(path) if all(row.get(k) == v for k, v in where.items())]
    if not rows:
        raise UserError(f"{path}: no row where {where}")
    keys = "preset", "method", "variant", "place", "export"
    different = {str({key: row.get(key) for key in keys if row.get(key)}) for row in rows}
    if len(different) > 1:
        raise UserError(f"{path}: where {where} leaves several results: {sorted(different)}")
    values = _means(rows)
    return [_Numbers().format(cell, **values) for cell in cells]


def _means(rows: list[Row]) -> dict[str, Any]:
    first = rows[0]
    entry = Entry("", first["preset"], first["variant"], (), first.get("export", ""), tuple(rows))
    known = {key for key, value in first.items() if isinstance(value, (int, float))}
    known = {key for key in known if all(row.get(key) is not None for row in rows)}
    values: dict[str, Any] = {key: entry.mean(key) for key in known}
    decoded = "psnr_after" if "psnr_after" in first else "psnr"
    by_seed = sorted(rows, key=lambda row: row["seed"])
    if "dropped" in values:
        values["kept"] = 1 - values["dropped"]
    if "train_seconds" in values:
        values["minutes"] = values["train_seconds"] / 60
    return values | {
        "psnr": entry.mean(decoded),
        "seeds": ", ".join(map(str, entry.seeds)),
        "every": ", ".join(f"{row[decoded]:.2f}" for row in by_seed),
        "every_bytes": ", ".join(f"{row['bytes']:,}" for row in by_seed),
    }


class _Numbers(string.Formatter):
    """Without attributes and indices: a cell is data."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        return kwargs[field_name], field_name
