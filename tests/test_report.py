"""Tables, curves and pages of rows, and tables of documents; all from files, by the command."""

from __future__ import annotations

import base64
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from masked_wavelet_nerf import doc_tables, report_page, report_tables, result_figures
from masked_wavelet_nerf.cli import main
from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.markdown import table
from masked_wavelet_nerf.results import add_rows
from masked_wavelet_nerf.summary import read_entries

RESULTS = sorted((Path(__file__).parent.parent / "docs" / "results").glob("*.jsonl"))


def row(**changes):
    return {
        "experiment": "0123",
        "preset": "p",
        "variant": "",
        "place": {},
        "scene": "s",
        "seed": 42,
        "export": "",
        "bytes": 12_345,
        "psnr_after": 30.126,
        "ssim": 0.98765,
        "dropped": 0.956,
        "train_seconds": 90.0,
        "render_rays_per_second": 45_678.9,
        "paper": {},
        "paper_mean": {},
    } | changes


@pytest.fixture
def write(tmp_path):
    def written(name: str, *rows) -> str:
        add_rows(tmp_path / f"{name}.jsonl", rows)
        return str(tmp_path / f"{name}.jsonl")

    return written


@pytest.fixture
def two_curves(write):
    """Ours takes a quarter of the bytes."""
    points = ((200_000, 30.0), (300_000, 31.5), (400_000, 32.0))
    return [
        write(
            name,
            *(row(preset=f"{name}{n}", bytes=b // factor, psnr_after=p)
              for n, (b, p) in enumerate(points)),
        )
        for name, factor in (("paper", 1), ("ours", 4))
    ]  # fmt: skip


def test_the_table_is_markdown_to_the_letter(write, capsys):
    old = row(preset="old", variant="λ | 2", seed=7)
    for key in ("place", "export", "ssim", "dropped", "train_seconds", "render_rays_per_second"):
        del old[key]
    path = write("rows", row(), row(place={"a.weight": 4e-9}, variant="v", export="small"), old)
    assert main(["report", path]) == 0
    assert capsys.readouterr().out.startswith(
        "|  | PSNR | bytes | SSIM | dropped | minutes | rays/s | seeds |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| p | 30.13 | 12,345 | 0.9877 | 95.6% | 1.5 | 45,679 | 42 |\n"
        "| p, v, weight 4e-09, small | 30.13 | 12,345 | 0.9877 | 95.6% | 1.5 | 45,679 | 42 |\n"
        "| old, λ \\| 2 | 30.13 | 12,345 | – | – | – | – | 7 |\n"
    )


def test_scenes_seeds_and_published_numbers_have_columns(write, capsys):
    path = write(
        "rows",
        row(scene="a", seed=2, psnr_after=30.0, paper={"psnr": 33.0, "megabytes": 0.5}),
        row(scene="a", seed=1, psnr_after=32.0, paper={"psnr": 33.0, "megabytes": 0.5}),
        row(scene="b", seed=1, psnr_after=21.0, paper={"psnr": 34.0, "megabytes": 1.0}),
        row(preset="q", scene="a", paper={"psnr": 33.0}),
        row(preset="q", scene="b", paper={}, paper_mean={"psnr": 31.5, "megabytes": 0.25}),
        row(preset="r", scene="b"),
    )
    assert main(["report", path]) == 0
    header, _, *lines = capsys.readouterr().out.splitlines()
    assert header.endswith(" | seeds | scenes | paper |")
    assert lines[0].startswith("| p | 26.00 ± 1.41 | 12,345 |")
    assert lines[0].endswith(" | 1, 2 | a, b | 33.50 dB, 0.750 MB |")
    # Not a mean over one scene of two; what all scenes have on average is on every row of new.
    assert lines[2].endswith(" | 42 | b | – |")


def test_the_published_mean_stands_in_for_scenes_without_numbers(write, capsys):
    mean = {"psnr": 31.5, "megabytes": 0.25}
    path = write(
        "rows",
        row(scene="a", paper={"psnr": 33.0}, paper_mean=mean),
        row(scene="b", paper_mean=mean),
        row(preset="q", scene="a", paper={"psnr": 33.0, "megabytes": 0.5}, paper_mean=mean),
    )
    assert main(["report", path]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].endswith(" | a, b | 31.50 dB, 0.250 MB (all scenes) |")
    assert lines[3].endswith(" | a | 33.00 dB, 0.500 MB |")


def test_a_quarter_of_the_bytes_is_75_percent_less(two_curves, capsys):
    assert main(["report", *two_curves]) == 0
    text = capsys.readouterr().out
    assert text.split("\n\n")[1].rstrip() == (
        "| curve | bytes at the PSNR of paper | PSNR at its bytes |\n"
        "| --- | ---: | ---: |\n"
        "| ours | -75.0% | – (the curves share no size) |"
    )
    assert "| paper2 | 32.00 | 400,000 |" in text and "| ours2 | 32.00 | 100,000 |" in text


def test_a_step_in_psnr_is_found_at_the_same_bytes(two_curves, write, capsys):
    points = ((200_000, 31.0), (300_000, 32.5), (400_000, 33.0))
    better = write("better", *(row(preset=f"q{b}", bytes=b, psnr_after=p) for b, p in points))
    assert main(["report", two_curves[0], better]) == 0
    line = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert line.startswith("| better | -") and line.endswith("% | +1.00 dB |")
    assert main(["report", two_curves[0], better, "--reference", "better"]) == 0
    line = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert line.startswith("| paper | +") and line.endswith("% | -1.00 dB |")


def test_another_curve_can_be_the_reference(two_curves, capsys):
    assert main(["report", *two_curves, "--reference", "ours"]) == 0
    text = capsys.readouterr().out
    assert "| curve | bytes at the PSNR of ours | PSNR at its bytes |" in text
    assert "| paper | +300.0% | " in text
    assert main(["report", *two_curves, "--reference", "their"]) == 2
    assert "--reference 'their': no such curve; there are paper, ours" in capsys.readouterr().err


def test_what_cannot_be_compared_says_why(two_curves, write, capsys):
    low = write("low", row(bytes=10, psnr_after=19.5), row(preset="q", bytes=20, psnr_after=20.5))
    falling = write(
        "falling",
        row(bytes=250_000, psnr_after=31.5),
        row(preset="q", bytes=350_000, psnr_after=30.5),
    )
    assert main(["report", two_curves[0], low, falling, two_curves[1]]) == 0
    assert capsys.readouterr().out.split("\n\n")[1].rstrip().splitlines()[2:] == [
        "| low | – (the curves share no PSNR) | – (the curves share no size) |",
        "| falling | – (PSNR does not rise with bytes) | – (PSNR does not rise with bytes) |",
        "| ours | -75.0% | – (the curves share no size) |",
    ]


def test_one_curve_is_compared_with_nothing(write, capsys):
    assert main(["report", write("rows", row(), row(seed=43))]) == 0
    assert "Bj" not in (text := capsys.readouterr().out) and "curve" not in text
    assert text.rstrip().count("\n") == 2


def test_a_sweep_of_words_is_reported(write, capsys):
    path = write("rows", *(row(place={"model.wavelet": name}) for name in ("haar", "db2")))
    assert main(["report", path]) == 0
    text = capsys.readouterr().out
    assert "| p, wavelet haar | 30.13 |" in text and "| p, wavelet db2 | 30.13 |" in text


def test_tables_and_figure_are_written(two_curves, tmp_path, capsys):
    text, picture = tmp_path / "new" / "tables.md", tmp_path / "newer" / "curves.png"
    assert main(["report", *two_curves, "--markdown", str(text), "--figure", str(picture)]) == 0
    entries = read_entries([Path(path) for path in two_curves])
    assert text.read_text("utf8") == report_tables.to_markdown(entries)
    assert capsys.readouterr().out.startswith(text.read_text("utf8"))
    colours = Image.open(picture).convert("RGB").getcolors(1 << 24)
    assert len(colours) > 100  # lines, marks and words


def test_quality_as_people_see_it_is_drawn_against_bytes(write, tmp_path):
    points = ((400_000, 32.0, 0.98), (100_000, 30.0, 0.95))
    path = write(
        "rows", *(row(preset=f"p{b}", bytes=b, psnr_after=p, ssim=s) for b, p, s in points)
    )
    entries = read_entries([Path(path)])
    (axes,) = result_figures.rate_perception(entries).axes
    (line,) = axes.lines
    assert line.get_xydata() == pytest.approx(np.array([[100, 0.95], [400, 0.98]]))
    assert axes.get_ylabel() == "SSIM"
    (axes,) = result_figures.rate_distortion(entries).axes
    assert axes.get_ylabel() == "PSNR, dB"
    picture = tmp_path / "curves.svg"
    assert main(["report", path, "--perception", str(picture)]) == 0
    assert picture.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected files of rows, or --tables"),
        (["{folder}/gone.jsonl"], "gone.jsonl: expected rows"),
        (["{folder}/p.toml"], "p.toml: expected rows"),
        (["{rows}", "--figure", "{folder}/curves.doc"], "curves.doc"),
        (["{rows}", "--perception", "{folder}/curves.doc"], "--perception {folder}/curves.doc"),
        (["{rows}", "--perception", "{folder}/curves.png"], "no row says its SSIM"),
        (["--tables", "{folder}/gone.toml"], "gone.toml"),
        (["--tables", "{folder}/p.toml"], "p.toml: [run]: expected file, columns and rows"),
        # Of which rows?
        (["--tables", "{folder}/empty.toml", "--html", "{folder}/page.html"], "--html"),
    ],
)
def test_the_command_says_what_is_wrong(write, tmp_path, capsys, arguments, message):
    (tmp_path / "p.toml").write_text('[run]\nmethod = "m"\n')
    (tmp_path / "empty.toml").write_text("")
    places = {"folder": tmp_path, "rows": write("rows", row(ssim=None))}
    assert main(["report", *(word.format(**places) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert message.format(**places) in error
    assert len(error.strip().splitlines()) == 1


class Page(HTMLParser):
    """Elements, links and words of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements, self.links, self.cells, self.comments = [], [], [], []
        self._open = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.links += [v for k, v in attributes if k.split(":")[-1] in ("href", "src", "srcset")]
        self.links += [v for k, v in attributes if k.startswith("on") or k == "action"]
        if tag in ("td", "th"):
            self.cells.append("")
            self._open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._open.pop()

    def handle_data(self, data):
        self.words += data
        if self._open:
            self.cells[-1] += data

    def handle_comment(self, data):
        self.comments.append(data)


def page(path: Path) -> Page:
    return Page(path.read_text("utf8"))


LOGGED = {
    "kept_by_level": {"level 1": 0.02, "level 0": 0.5, "lines": 0.25},
    "training": {"psnr": [[0, 10.0], [100, 30.0]], "kept": [[0, 1.0], [100, 0.05]]},
    "command": "ns-train m --x '<y>' --data DATA d",
    "commit": "0123456789ab+",
    "device": "cpu",
    "machine": {"system": "Linux", "processor": "Chip & Co", "cores": 2},
    "versions": {"python": "3.11", "torch": "2.9"},
    "configuration": {"pipeline.model.bits": 8, "pipeline.model.wavelet": "<bior>"},
}


def test_the_page_stands_alone(two_curves, write, tmp_path):
    path = tmp_path / "page.html"
    more = write("more", row(**LOGGED))
    assert main(["report", *two_curves, more, "--html", str(path)]) == 0
    found = page(path)
    tags = [tag for tag, _ in found.elements]
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(tags)
    assert tags.count("svg") == 4
    assert [link for link in found.links if not link.startswith("#")] == []
    assert len(found.links) > 10  # figures refer to their own marks
    text = path.read_text("utf8")
    assert "@import" not in text and "url(http" not in text and "url(//" not in text
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")
    assert "<!DOCTYPE svg" not in text and "<?xml" not in text


def test_the_page_holds_all_tables_and_where_numbers_come_from(two_curves, write, tmp_path):
    path = tmp_path / "page.html"
    files = [*two_curves, write("more", row(**LOGGED))]
    assert main(["report", *files, "--html", str(path), "--reference", "ours"]) == 0
    found = page(path)
    entries = read_entries([Path(file) for file in files])
    header, lines = report_tables.result_rows(entries)
    _, comparisons = report_tables.compare(entries, "ours")
    cells = [*header, *(cell for line in lines for cell in line)]
    cells += ["curve", "bytes at the same PSNR", "PSNR at the same bytes"]
    assert found.cells == cells + [cell for comparison in comparisons for cell in comparison]
    assert "+300.0%" in found.cells
    assert "Against ours (Bj" in found.words
    assert "7 lines" in found.words
    for words in (
        LOGGED["command"],
        "commit 0123456789ab+; cpu, Linux, Chip & Co, 2",
        "python 3.11, torch 2.9",
        "pipeline.model.bits = 8\npipeline.model.wavelet = <bior>\n",
    ):
        assert words in found.words, words


@pytest.mark.parametrize(
    "name", ["<b>bold</b>", "--><script>alert(1)</script>", '"><img src=x onerror=y>', "&lt;"]
)
def test_names_are_words_and_never_markup(write, tmp_path, name):
    path = tmp_path / "page.html"
    rows = [row(variant=name, place={"w": w}, bytes=w, psnr_after=w, **LOGGED) for w in (8, 9)]
    others = [row(variant="other", place={"w": w}, bytes=w, psnr_after=w) for w in (8, 9)]
    assert main(["report", write("rows", *rows, *others), "--html", str(path)]) == 0
    found = page(path)
    assert not {"b", "script", "img"} & {tag for tag, _ in found.elements}
    assert found.cells.count(f"p, {name}, w 8") == 1
    assert f"Against {name} (Bj" in found.words
    assert path.read_text("utf8").count("</html>") == 1
    assert found.elements[-1][0] == "pre"  # not cut off by a comment that ends too early


def test_names_with_dollars_are_no_formulas(write, tmp_path):
    path = tmp_path / "page.html"
    rows = write("rows", row(variant="$^$ per $\\frac$", place={"w": 1}, **LOGGED))
    assert main(["report", rows, "--html", str(path)]) == 0
    assert "p, $^$ per $\\frac$, w 1" in page(path).cells


def test_pictures_of_runs_are_in_the_page(write, tmp_path):
    runs, path = tmp_path / "runs", tmp_path / "page.html"
    pictures = {"aa": b"\x89PNG one", "bb/small": b"\x89PNG two"}
    for name, content in pictures.items():
        (runs / name).mkdir(parents=True, exist_ok=True)
        (runs / name / "side_by_side.png").write_bytes(content)
    file = write(
        "rows",
        row(experiment="aa", variant="<b>"),
        row(experiment="bb", export="small"),
        row(experiment="bb", export="large"),
        row(experiment="gone", preset="gone"),
    )
    assert main(["report", file, "--html", str(path), "--runs", str(runs)]) == 0
    found = page(path)
    shown = [attributes for tag, attributes in found.elements if tag == "img"]
    assert [picture["alt"] for picture in shown] == [
        "p, <b>: 30.13 dB, 12,345 bytes",
        "p, small: 30.13 dB, 12,345 bytes",
    ]
    kind = "data:image/png;base64,"
    assert all(picture["src"].startswith(kind) for picture in shown)
    contents = [base64.b64decode(picture["src"][len(kind) :]) for picture in shown]
    assert contents == [pictures["aa"], pictures["bb/small"]]
    assert main(["report", file, "--html", str(path)]) == 0
    assert "img" not in {tag for tag, _ in page(path).elements}


def test_a_picture_of_any_run_of_a_line_will_do(write, tmp_path):
    runs, path = tmp_path / "runs", tmp_path / "page.html"
    (runs / "bb").mkdir(parents=True)
    (runs / "bb" / "side_by_side.png").write_bytes(b"\x89PNG")
    file = write("rows", row(experiment="aa"), row(experiment="bb", seed=43, bytes=777))
    assert main(["report", file, "--html", str(path), "--runs", str(runs)]) == 0
    (picture,) = [attributes for tag, attributes in page(path).elements if tag == "img"]
    assert picture["alt"] == "p: 30.13 dB, 777 bytes"  # its own numbers


def test_a_picture_is_of_its_row_alone(write, tmp_path):
    """Rows of before do not say where their runs are."""
    (tmp_path / "side_by_side.png").write_bytes(b"\x89PNG of something else")
    old, path = row(), tmp_path / "page.html"
    del old["experiment"], old["export"]
    rows = write("rows", old)
    assert main(["report", rows, "--html", str(path), "--runs", str(tmp_path)]) == 0
    assert "img" not in {tag for tag, _ in page(path).elements}


def test_rows_of_before_make_a_page_too(tmp_path, capsys):
    files = [
        path
        for path in RESULTS
        if all("psnr_after" in json.loads(line) for line in path.read_text("utf8").splitlines())
    ]
    assert len(files) > 5
    path = tmp_path / "page.html"
    assert main(["report", *map(str, files), "--html", str(path)]) == 0
    cells = page(path).cells
    for file in files:
        for line in file.read_text("utf8").splitlines():
            name = ", ".join(
                word for word in (json.loads(line)[k] for k in ("preset", "variant")) if word
            )
            assert any(cell == name or cell.startswith(f"{name}, ") for cell in cells), name
    presets = next(file for file in files if file.stem == "presets")
    three = [json.loads(line) for line in presets.read_text("utf8").splitlines()]
    three = [row for row in three if row["preset"] == "lego_100_tiny" and not row["variant"]]
    mean = np.mean([row["psnr_after"] for row in three])
    spread = np.std([row["psnr_after"] for row in three], ddof=1)
    assert f"{mean:.2f} ± {spread:.2f}" in cells
    assert f"{np.mean([row['bytes'] for row in three]):,.0f}" in cells


def test_rows_of_other_commands_are_refused_by_name(tmp_path, capsys):
    peers = [path for path in RESULTS if path.stem == "peers_lego_100"]
    assert main(["report", str(*peers)]) == 2
    assert "peers_lego_100.jsonl: row 1 is none of mwnerf bench" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--html", "--markdown", "--figure", "--perception"])
def test_a_failed_write_leaves_the_old_file(write, tmp_path, monkeypatch, capsys, flag):
    folder = tmp_path / "out"
    folder.mkdir()
    path = folder / "old.png"
    path.write_bytes(b"precious")
    rows = write("rows", row())

    def half(file, *_, **__):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patches:
        patches.setattr(Path, "write_text", half)
        patches.setattr("matplotlib.figure.Figure.savefig", lambda _, file, **__: half(file))
        if flag == "--html":
            patches.setattr(report_page, "to_html", lambda *_: "new")
        assert main(["report", rows, flag, str(path)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert path.read_bytes() == b"precious"
    assert list(folder.iterdir()) == [path]
    assert main(["report", rows, flag, str(path)]) == 0
    assert path.read_bytes() not in (b"precious", b"half")


def test_what_is_kept_is_drawn_level_by_level(write):
    entries = read_entries([Path(write("rows", row(**LOGGED), row(preset="none")))])
    (axes,) = result_figures.kept_levels(entries).axes
    (line,) = axes.lines
    assert [label.get_text() for label in axes.get_xticklabels()] == ["lines", "level 0", "level 1"]
    assert line.get_xdata() == pytest.approx([0, 1, 2])
    assert line.get_ydata() == pytest.approx([25, 50, 2])
    assert line.get_label() == "p"
    assert result_figures.kept_levels(entries[1:]) is None


def test_training_is_drawn_against_steps(write):
    entries = read_entries([Path(write("rows", row(**LOGGED), row(preset="none", training={})))])
    psnr, kept = result_figures.training(entries).axes
    assert [line.get_xydata().tolist() for line in psnr.lines] == [[[0, 10], [100, 30]]]
    assert [line.get_xydata().tolist() for line in kept.lines] == [[[0, 100], [100, 5]]]
    assert result_figures.training(entries[1:]) is None


def test_the_same_figure_is_the_same_text(two_curves):
    entries = read_entries([Path(path) for path in two_curves])
    one, other = (result_figures.to_svg(result_figures.rate_distortion(entries)) for _ in range(2))
    assert one == other
    assert one.startswith("<svg ") and one.rstrip().endswith("</svg>")
    assert one != result_figures.to_svg(result_figures.rate_distortion(entries[:3]))


def test_a_cell_is_a_cell_whatever_it_holds():
    assert table(["", "a|b"], [["two\nlines", "1"], ["", ""]]) == (
        "|  | a\\|b |\n| --- | ---: |\n| two lines | 1 |\n|  |  |\n"
    )
    with pytest.raises(ValueError, match="3 cells for 2 columns"):
        table(["a", "b"], [["1", "2"], ["1", "2", "3"]])


SPEC = """
[sizes]
file = "../README.md"
columns = ["", "PSNR", "bytes"]
[[sizes.rows]]
cells = ["ours, {seeds}", "**{psnr:.2f} dB** ({every})", "{bytes:,.0f}"]
results = "results/rows.jsonl"
where = { preset = "p", variant = "" }
[[sizes.rows]]
cells = ["published", "33.10", "1,000"]

[other]
file = "other.md"
columns = ["minutes"]
[[other.rows]]
cells = ["{train_seconds:.0f} s"]
results = "results/rows.jsonl"
where = { preset = "q" }
"""
README = (
    "# Title\n\n  text  \n<!-- table sizes -->\n\n| old |\n\n<!-- end -->\ntrailing\t\n\n"
    "| not | ours |\n<!-- end -->\n<!-- table unknown -->\nleft\n<!-- end -->\nno newline"
)
OTHER = "<!-- table other -->\n<!-- end -->\n"


@pytest.fixture
def docs(tmp_path):
    """A folder of documents, a specification of their tables, and its rows."""
    folder = tmp_path / "docs"
    folder.mkdir()
    (tmp_path / "README.md").write_text(README, "utf8")
    (folder / "other.md").write_text(OTHER, "utf8")
    (folder / "tables.toml").write_text(SPEC, "utf8")
    add_rows(
        folder / "results" / "rows.jsonl",
        [
            row(seed=43, psnr_after=31.0, bytes=3000),
            row(seed=42, psnr_after=30.0, bytes=1000),
            row(preset="q", train_seconds=60),
            row(variant="v", psnr_after=99.0),
        ],
    )
    return folder


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text("utf8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), "utf8")


def test_tables_of_documents_are_written_to_the_letter(docs, tmp_path, capsys):
    assert main(["report", "--tables", str(docs / "tables.toml")]) == 0
    assert (tmp_path / "README.md").read_text("utf8") == README.replace(
        "\n| old |\n\n",
        "\n|  | PSNR | bytes |\n| --- | ---: | ---: |\n"
        "| ours, 42, 43 | **30.50 dB** (30.00, 31.00) | 2,000 |\n"
        "| published | 33.10 | 1,000 |\n\n",
    )
    assert (docs / "other.md").read_text("utf8") == (
        "<!-- table other -->\n\n| minutes |\n| --- |\n| 60 s |\n\n<!-- end -->\n"
    )
    shown = capsys.readouterr().out.replace("\n", "")
    assert "README.md" in shown and "other.md" in shown
    before = (tmp_path / "README.md").read_bytes(), (docs / "other.md").read_bytes()
    updated = doc_tables.update(docs / "tables.toml")
    assert [path.resolve() for path in updated] == [tmp_path / "README.md", docs / "other.md"]
    assert ((tmp_path / "README.md").read_bytes(), (docs / "other.md").read_bytes()) == before


def test_a_document_may_have_several_tables(docs, tmp_path):
    spec, document = docs / "tables.toml", tmp_path / "README.md"
    for name in ("../README.md", "../docs/../README.md"):
        document.write_text(README + "\n" + OTHER, "utf8")
        spec.write_text(SPEC.replace('"other.md"', f'"{name}"'), "utf8")
        doc_tables.update(spec)
        text = document.read_text("utf8")
        assert "| ours, 42, 43 |" in text and "| 60 s |" in text
        assert (docs / "other.md").read_text("utf8") == OTHER


REPORT = """
[other]
file = "other.md"
report = ["results/a.jsonl", "results/b.jsonl"]
reference = "b"
"""


def test_a_document_may_hold_what_report_prints(docs, capsys):
    files = [docs / "results" / f"{name}.jsonl" for name in "ab"]
    for file, factor in zip(files, (1, 4), strict=True):
        rows = [row(preset=f"p{n}", bytes=factor * n, psnr_after=30.0 + n) for n in (1, 3)]
        add_rows(file, rows)
    (docs / "tables.toml").write_text(REPORT, "utf8")
    doc_tables.update(docs / "tables.toml")
    assert main(["report", *map(str, files), "--reference", "b"]) == 0
    printed = capsys.readouterr().out.rstrip()
    assert "| a | -75.0% |" in printed
    text = (docs / "other.md").read_text("utf8")
    assert text == f"<!-- table other -->\n\n{printed}\n\n<!-- end -->\n"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('reference = "b"', 'reference = "c"', r"tables\.toml: \[other\].*'c': no such curve"),
        ("a.jsonl", "gone.jsonl", r"tables\.toml: \[other\].*gone\.jsonl"),
        ('["results/a.jsonl", "results/b.jsonl"]', '"results/a.jsonl"', r"\[other\]"),
        ('["results/a.jsonl", "results/b.jsonl"]', "[3]", r"\[other\]"),
        ('["results/a.jsonl", "results/b.jsonl"]', "[]", r"\[other\]"),
        ('reference = "b"', "reference = 3", r"\[other\]"),
        ('reference = "b"\n', "", r"\[other\]: expected .* file, report and reference"),
        ('reference = "b"', 'reference = "b"\nrows = []', r"\[other\]: expected "),
    ],
)
def test_reports_in_documents_that_cannot_be_are_refused_by_name(docs, old, new, message):
    for name in "ab":
        add_rows(docs / "results" / f"{name}.jsonl", [row()])
    (docs / "tables.toml").write_text(REPORT, "utf8")
    edit(docs / "tables.toml", old, new)
    refused(docs, message)


def test_numbers_are_means_over_scenes_too(docs):
    rows = [row(preset="w", scene=s, seed=i, psnr_after=p, bytes=10)
            for s, i, p in (("a", 1, 30.0), ("a", 2, 32.0), ("b", 1, 20.0))]  # fmt: skip
    add_rows(docs / "results" / "rows.jsonl", rows)
    edit(docs / "tables.toml", 'preset = "q"', 'preset = "w"')
    edit(docs / "tables.toml", "{train_seconds:.0f} s", "{psnr:.2f}, {psnr_after:.1f}, {bytes}")
    doc_tables.update(docs / "tables.toml")
    assert "| 25.50, 25.5, 10.0 |" in (docs / "other.md").read_text("utf8")


def test_rows_of_peers_know_their_psnr(docs):
    peer = row(preset="peer", psnr=28.4)
    del peer["psnr_after"], peer["export"], peer["place"]
    add_rows(docs / "results" / "rows.jsonl", [peer])
    edit(docs / "tables.toml", 'preset = "q"', 'preset = "peer"')
    edit(docs / "tables.toml", "{train_seconds:.0f} s", "{psnr:.2f}, {every}")
    doc_tables.update(docs / "tables.toml")
    assert "| 28.40, 28.40 |" in (docs / "other.md").read_text("utf8")


def test_minutes_are_those_of_training(docs):
    rows = [row(preset="w", seed=i, train_seconds=60.0 * i) for i in (1, 2)]
    add_rows(docs / "results" / "rows.jsonl", rows)
    edit(docs / "tables.toml", 'preset = "q"', 'preset = "w"')
    edit(docs / "tables.toml", "{train_seconds:.0f} s", "{minutes:.2f}")
    doc_tables.update(docs / "tables.toml")
    assert "| 1.50 |" in (docs / "other.md").read_text("utf8")


def test_rows_that_do_not_know_their_minutes_give_other_numbers(docs):
    short = row(preset="w")
    del short["train_seconds"]
    add_rows(docs / "results" / "rows.jsonl", [short])
    edit(docs / "tables.toml", 'preset = "q"', 'preset = "w"')
    edit(docs / "tables.toml", "{train_seconds:.0f} s", "{psnr:.1f}")
    doc_tables.update(docs / "tables.toml")
    assert "| 30.1 |" in (docs / "other.md").read_text("utf8")


def test_cells_without_results_stand_as_they_are(docs, tmp_path):
    edit(docs / "tables.toml", '"33.10"', '"{33.10}, {{0}}"')
    doc_tables.update(docs / "tables.toml")
    assert "| published | {33.10}, {{0}} | 1,000 |" in (tmp_path / "README.md").read_text("utf8")


def test_a_table_may_hold_what_looks_like_a_reference(docs, tmp_path):
    edit(docs / "tables.toml", '"33.10"', '"\\\\1 \\\\g<0>"')
    doc_tables.update(docs / "tables.toml")
    assert "| published | \\1 \\g<0> | 1,000 |" in (tmp_path / "README.md").read_text("utf8")


def refused(docs: Path, message: str) -> None:
    """The tables are, and no document has changed."""
    paths = docs.parent / "README.md", docs / "other.md"
    before = [path.read_bytes() for path in paths]
    with pytest.raises(UserError, match=message):
        doc_tables.update(docs / "tables.toml")
    assert [path.read_bytes() for path in paths] == before


@pytest.mark.parametrize(
    "document",
    [
        "nothing\n",
        "<!-- table other -->\n| a |\n",  # without an end
        "<!-- table other -->\n<!-- table more -->\n<!-- end -->\n",  # the end of another
        "<!-- end -->\n<!-- table other -->\n",
        OTHER + OTHER,
        "<!-- table other -->\n| a |\n" + OTHER,  # the first has no end
    ],
)
def test_a_marker_that_is_not_there_once_is_refused_by_name(docs, document):
    (docs / "other.md").write_text(document, "utf8")
    refused(docs, r"other\.md: expected one <!-- table other --> … <!-- end -->")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{train_seconds:.0f}", "{trane_seconds:.0f}", r"\[other\] row 1: .*trane_seconds"),
        ("{train_seconds:.0f}", "{psnr.__class__}", r"\[other\] row 1: .*psnr\.__class__"),
        ("{train_seconds:.0f}", "{psnr.real}", r"\[other\] row 1: .*psnr\.real"),
        ("{train_seconds:.0f}", "{seeds[0]}", r"\[other\] row 1: .*seeds\[0\]"),
        ("{train_seconds:.0f}", "{psnr:{psnr.real}}", r"\[other\] row 1: .*psnr\.real"),
        ("{train_seconds:.0f}", "{psnr:x}", r"\[other\] row 1: "),
        ("{train_seconds:.0f}", "{}", r"\[other\] row 1: "),
        ("{train_seconds:.0f}", "{0}", r"\[other\] row 1: "),
        ("{train_seconds:.0f}", "{psnr", r"\[other\] row 1: "),
        ("{train_seconds:.0f}", "{command}", r"\[other\] row 1: .*command"),
        ('preset = "q"', 'preset = "z"', r"rows\.jsonl: no row where .*'z'"),
        ('preset = "q"', 'perset = "q"', r"rows\.jsonl: no row where .*'perset'"),
        ('preset = "q"', 'scene = "s"', r"rows\.jsonl: where .* leaves several results: .*'v'"),
        ('preset = "q"', 'preset = "p"', r"rows\.jsonl: where .* leaves several results: .*'v'"),
        ('columns = ["minutes"]', 'columns = ["a", "b"]', r"\[other\]: 1 cells for 2 columns"),
        ('columns = ["minutes"]', "columns = [3]", r"\[other\]"),
        ('columns = ["minutes"]\n', "", r"\[other\]: expected file, columns and rows"),
        ('columns = ["minutes"]', 'columns = ["m"]\nmore = 3', r"\[other\]: expected file, col"),
        ('file = "other.md"', 'file = "gone.md"', r"\[other\] file: .*gone\.md"),
        ('cells = ["{train_seconds:.0f} s"]', "cells = [33.1]", r"\[other\] row 1: "),
        ('cells = ["{train_seconds:.0f} s"]\n', "", r"\[other\] row 1: .*cells"),
        ('where = { preset = "q" }', 'where = "q"', r"\[other\] row 1: .*where"),
    ],
)
def test_tables_that_cannot_be_are_refused_by_name(docs, old, new, message):
    edit(docs / "tables.toml", old, new)
    refused(docs, message)


def test_several_exports_are_several_results(docs):
    """Their mean says nothing."""
    rows = [row(preset="w", export=e, bytes=b) for e, b in (("range", 1000), ("paper", 3000))]
    add_rows(docs / "results" / "rows.jsonl", rows)
    edit(docs / "tables.toml", 'preset = "q"', 'preset = "w"')
    refused(docs, r"rows\.jsonl: where .* leaves several results: .*paper.*range|range.*paper")


def test_several_methods_of_peers_are_several_results(docs):
    for method in ("ours", "theirs"):
        peer = row(preset="peer", method=method, psnr=28.4)
        del peer["psnr_after"], peer["export"], peer["place"]
        add_rows(docs / "results" / "rows.jsonl", [peer])
    edit(docs / "tables.toml", 'preset = "q"', 'preset = "peer"')
    refused(docs, r"rows\.jsonl: where .* leaves several results: .*ours.*theirs")
    edit(docs / "tables.toml", 'preset = "peer"', 'preset = "peer", method = "ours"')
    doc_tables.update(docs / "tables.toml")
    assert "| 90 s |" in (docs / "other.md").read_text("utf8")


def test_several_places_of_a_sweep_are_several_results(docs):
    add_rows(docs / "results" / "rows.jsonl", [row(preset="w", place={"w": w}) for w in (1, 2)])
    edit(docs / "tables.toml", 'preset = "q"', 'preset = "w"')
    refused(docs, r"rows\.jsonl: where .* leaves several results")
    edit(docs / "tables.toml", 'preset = "w"', 'preset = "w", place = { w = 2 }')
    doc_tables.update(docs / "tables.toml")
    assert "| 90 s |" in (docs / "other.md").read_text("utf8")


@pytest.mark.parametrize("cell", ["{ssim}", "{ssim:.4f}"])
def test_a_number_that_some_rows_lack_is_refused_by_name(docs, cell):
    lacking = row(preset="q", seed=43)
    del lacking["ssim"]
    add_rows(docs / "results" / "rows.jsonl", [lacking])
    edit(docs / "tables.toml", "{train_seconds:.0f}", cell)
    refused(docs, r"\[other\] row 1: .*ssim")


@pytest.mark.parametrize("content", ["[[[", "other = 3\n"])
def test_a_specification_that_is_none_is_refused_by_name(docs, content):
    (docs / "tables.toml").write_text(content)
    refused(docs, r"tables\.toml: ")


def test_a_document_that_is_no_text_is_refused_by_name(docs):
    (docs / "other.md").write_bytes(OTHER.encode() + b"\xff\xfe")
    refused(docs, r"other\.md|\[other\] file")


def test_results_that_are_none_are_refused_by_name(docs):
    (docs / "results" / "rows.jsonl").write_bytes(b"no rows\n")
    refused(docs, r"rows\.jsonl: expected rows")


def test_tables_of_our_documents_are_those_of_our_rows(tmp_path):
    """Byte for byte: whoever changes a row, a table or its words by hand is found."""
    root = Path(__file__).parent.parent
    shutil.copytree(root / "docs", tmp_path / "docs")
    shutil.copy(root / "README.md", tmp_path)
    updated = doc_tables.update(tmp_path / "docs" / "tables.toml")
    names = [path.relative_to(tmp_path) for path in updated]
    assert {name.name for name in names} == {"README.md", "rate_distortion.md", "experiments.md"}
    for name in names:
        assert (tmp_path / name).read_bytes() == (root / name).read_bytes(), name
