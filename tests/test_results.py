"""Files of rows, and rows brought together: means and spreads in closed form, curves."""

from __future__ import annotations

import contextlib
import json
import math

import pytest

from masked_wavelet_nerf.curves import Point
from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.results import add_rows, read_rows
from masked_wavelet_nerf.summary import curves_of, read_entries


def row(**changes):
    return {
        "preset": "p",
        "variant": "",
        "place": {},
        "scene": "s",
        "seed": 42,
        "export": "",
        "bytes": 1000,
        "psnr_after": 30.0,
    } | changes


@pytest.fixture
def entries(tmp_path):
    """Entries of rows that went through a file."""

    def read(*rows, name="rows.jsonl"):
        add_rows(tmp_path / name, rows)
        return read_entries([tmp_path / name])

    return read


def test_rows_are_read_back_in_their_order(tmp_path):
    path = tmp_path / "new" / "folder" / "rows.jsonl"
    rows = [
        row(variant="λ = 1e-9\nand more", place={"a.b": [1, 2]}),
        {"psnr": math.inf, "none": None, "deep": {"x": [0.1, 1e-300]}},
    ]
    add_rows(path, rows[:1])
    add_rows(path, [])
    add_rows(path, rows[1:])
    assert read_rows(path) == rows
    assert path.read_bytes().count(b"\n") == 2
    assert [json.loads(line) for line in path.read_text("utf8").splitlines()] == rows


@pytest.mark.parametrize("cut", [b'{"preset": "p", "by', b'{"preset": "\xce', b"{", b"  "])
def test_a_line_that_was_cut_off_is_skipped_and_overwritten(tmp_path, cut):
    path = tmp_path / "rows.jsonl"
    add_rows(path, [row(seed=1)])
    whole = path.read_bytes()
    path.write_bytes(whole + cut)
    assert read_rows(path) == [row(seed=1)]
    add_rows(path, [row(seed=2), row(seed=3)])
    assert read_rows(path) == [row(seed=1), row(seed=2), row(seed=3)]
    assert path.read_bytes().startswith(whole + b'{"preset": "p"')


def test_a_whole_last_row_without_its_newline_is_not_lost(tmp_path):
    """Other tools than ours put newlines between lines."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row(seed=seed)) for seed in (1, 2)))
    assert read_rows(path) == [row(seed=1), row(seed=2)]
    add_rows(path, [row(seed=3)])
    assert read_rows(path) == [row(seed=1), row(seed=2), row(seed=3)]


def test_rows_are_on_the_disk_when_they_are_added(tmp_path, monkeypatch):
    synced = []
    path = tmp_path / "rows.jsonl"
    monkeypatch.setattr("os.fsync", lambda _: synced.append(path.read_text()))
    add_rows(path, [row()])
    assert synced == [json.dumps(row()) + "\n"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "UnicodeDecodeError"),
        (b'[run]\nmethod = "m"\n', "JSONDecodeError"),
        (b'[\n{"preset": "p"}\n]\n', "JSONDecodeError"),
        (b'{"preset": "p"}\n[1, 2]\n', "row 2 is no object"),
        (b'{"preset": "p"}\n3\n', "row 2 is no object"),
        (b'{"preset": "p"\n{"preset": "p"}\n', "JSONDecodeError"),  # not cut off at the end
        (b'[{"preset": "p"}]', "no rows"),
        (b"", "no rows"),
        (b"\n\n", "no rows"),
        (None, "No such file"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, content, why):
    path = tmp_path / "foreign.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"foreign\.bin: .*{why}"):
        read_rows(path)
    assert not path.exists() if content is None else path.read_bytes() == content


def test_another_file_is_not_added_to(tmp_path):
    path = tmp_path / "foreign.txt"
    path.write_bytes(b"these are\nno rows\n")
    with pytest.raises(ValueError, match="Expecting value"):
        add_rows(path, [row()])
    assert path.read_bytes() == b"these are\nno rows\n"


def test_a_mean_is_over_scenes_of_means_over_seeds(entries):
    (entry,) = entries(
        row(scene="a", seed=1, psnr_after=30.0, bytes=100),
        row(scene="b", seed=1, psnr_after=20.0, bytes=10),
        row(scene="a", seed=2, psnr_after=32.0, bytes=300),
        row(scene="b", seed=3, psnr_after=21.0, bytes=20),
        row(scene="b", seed=2, psnr_after=22.0, bytes=60),
    )
    assert entry.mean("psnr_after") == pytest.approx((31 + 21) / 2)  # of all rows: 25
    assert entry.mean("bytes") == pytest.approx((200 + 30) / 2)
    assert entry.point() == pytest.approx((115, 26))
    assert isinstance(entry.point(), Point)
    assert entry.point("what no row has") is None
    assert entry.scenes == ["a", "b"]
    assert entry.seeds == [1, 2, 3]


def test_a_mean_of_what_not_all_rows_have_is_none(entries):
    (entry,) = entries(
        row(ssim=0.9, kept=0, note=None), row(seed=43, kept=1, note=3), row(seed=44, kept=2, note=3)
    )
    assert entry.mean("ssim") is None
    assert entry.mean("note") is None
    assert entry.mean("absent") is None
    assert entry.mean("kept") == 1  # zero is a number


def test_a_spread_is_pooled_over_scenes(entries):
    (entry,) = entries(
        *(row(scene="a", seed=seed, psnr_after=psnr) for seed, psnr in ((1, 30.0), (2, 32.0))),
        *(row(scene="b", seed=seed, psnr_after=19.0 + seed) for seed in (1, 2, 3)),
        row(scene="c", psnr_after=99.0),  # one seed says nothing of spread
    )
    # Variances 2 with one degree of freedom, 1 with two.
    assert entry.spread("psnr_after") == pytest.approx(math.sqrt((2 * 1 + 1 * 2) / 3))


def test_scenes_that_differ_are_no_spread(entries):
    (entry,) = entries(row(scene="a", psnr_after=30.0), row(scene="b", psnr_after=20.0))
    assert entry.spread("psnr_after") is None


def test_rows_that_differ_in_scene_and_seed_are_one_entry(entries):
    found = entries(
        row(variant="v"),
        row(preset="q"),
        row(variant="v", seed=43),
        row(place={"m.bits": 4}),
        row(place={"m.bits": 6}),
        row(export="small"),
        row(variant="v", scene="t"),
        row(place={"m.bits": 4}, seed=7),
    )
    assert [(entry.name, len(entry.rows)) for entry in found] == [
        ("p, v", 3),
        ("q", 1),
        ("p, bits 4", 2),
        ("p, bits 6", 1),
        ("p, small", 1),
    ]
    assert [entry.source for entry in found] == ["rows"] * 5


def test_the_same_preset_in_two_files_is_two_entries(tmp_path):
    for name, num_bytes in (("before", 100), ("after", 50)):
        add_rows(tmp_path / f"{name}.jsonl", [row(bytes=num_bytes)])
    found = read_entries([tmp_path / "before.jsonl", tmp_path / "after.jsonl"])
    assert [(entry.source, entry.mean("bytes")) for entry in found] == [
        ("before", 100),
        ("after", 50),
    ]


def test_rows_of_before_need_neither_place_nor_export(entries):
    old = row()
    del old["place"], old["export"]
    (entry,) = entries(old, row(seed=43))
    assert (entry.place, entry.export, entry.name, len(entry.rows)) == ((), "", "p", 2)


@pytest.mark.parametrize(("key", "values"), [("steps", (10, 4000)), ("eval_stride", (1, 4))])
def test_trainings_cut_short_are_not_averaged_with_whole_ones(entries, key, values):
    """As bench --steps with the same --rows adds them."""
    with contextlib.suppress(UserError):
        for entry in entries(*(row(**{key: value}) for value in values)):
            assert len({found[key] for found in entry.rows}) == 1


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ({"pipeline.model.mask-weight": 4e-9, "steps": 100}, "p, mask-weight 4e-09, steps 100"),
        ({"pipeline.model.wavelet": "haar"}, "p, wavelet haar"),
        ({"pipeline.model.upsample-steps": [500, 1000]}, "p, upsample-steps [500, 1000]"),
    ],
)
def test_a_place_is_named_whatever_is_swept(entries, place, name):
    (entry,) = entries(row(place=place), row(place=place, seed=43))
    assert entry.name == name
    assert entry.mean("bytes") == 1000


@pytest.mark.parametrize(
    "wrong",
    [
        {"scene": None},
        {"scene": 3},
        {"seed": "42"},
        {"seed": 4.5},
        {"bytes": 0},
        {"bytes": -5},
        {"bytes": "many"},
        {"bytes": None},
        {"psnr_after": math.nan},
        {"psnr_after": math.inf},
        {"psnr_after": [30]},
        {"place": [1]},
        {"place": 3},
        {"preset": 3},
        {"preset": None},
        {"variant": ["v"]},
        {"variant": 3},
        {"export": 3},
        {"place": {"w": {"x": 1}}},
        {"place": {"w": [[1], [2]]}},
        {"steps": [10]},
    ],
)
def test_rows_of_something_else_are_refused_by_number(entries, wrong):
    with pytest.raises(UserError, match=r"rows\.jsonl: row 2 is none of mwnerf bench"):
        entries(row(), row(**wrong))


@pytest.mark.parametrize("key", ["preset", "variant", "scene", "seed", "bytes", "psnr_after"])
def test_rows_that_lack_something_are_refused_by_name(entries, key):
    lacking = row()
    del lacking[key]
    with pytest.raises(UserError, match=rf"rows\.jsonl: row 2 .*{key}"):
        entries(row(), lacking)


def test_curves_are_the_variants_of_a_sweep(entries):
    found = entries(
        row(variant="haar", place={"w": 2}, bytes=300, psnr_after=33.0),
        row(variant="dct", place={"w": 1}, bytes=50, psnr_after=29.0),
        row(variant="haar", place={"w": 1}, bytes=100, psnr_after=30.0),
        row(variant="haar", place={"w": 1}, bytes=200, psnr_after=31.0, seed=43),
        row(variant="", place={"w": 1}, bytes=70, psnr_after=28.0),
    )
    curves = curves_of(found)
    assert list(curves) == ["haar", "dct", "p"]
    assert curves == {
        "haar": [Point(150, 30.5), Point(300, 33)],
        "dct": [Point(50, 29)],
        "p": [Point(70, 28)],
    }


def test_rows_outside_of_a_sweep_are_one_curve_of_their_file(entries):
    found = entries(
        row(preset="large", bytes=300, psnr_after=33.0),
        row(preset="small", bytes=100, psnr_after=31.0),
        row(preset="small", variant="v", bytes=200, psnr_after=32.0),
        name="presets.jsonl",
    )
    assert curves_of(found) == {"presets": [Point(100, 31), Point(200, 32), Point(300, 33)]}


def test_curves_of_another_quality_have_the_rows_that_say_it(entries):
    found = entries(
        row(variant="v", place={"w": 1}, bytes=100, ssim=0.9),
        row(variant="v", place={"w": 2}, bytes=200),
        row(variant="u", place={"w": 1}, bytes=100),
    )
    assert curves_of(found, "ssim") == {"v": [Point(100, 0.9)]}


def test_exports_are_curves_of_their_own(entries):
    found = entries(
        row(variant="v", place={"w": 1}, export="range", bytes=100),
        row(variant="v", place={"w": 1}, export="paper", bytes=300),
        row(export="paper", bytes=400),
    )
    assert curves_of(found) == {
        "v, range": [Point(100, 30)],
        "v, paper": [Point(300, 30)],
        "rows, paper": [Point(400, 30)],
    }


def test_a_sweep_before_and_after_a_change_is_two_curves(tmp_path):
    """As their points would be mixed, the curve would fall."""
    for name, factor in (("before", 4), ("after", 1)):
        rows = [row(place={"w": w}, bytes=w * factor, psnr_after=30.0 + w) for w in (1, 2)]
        add_rows(tmp_path / f"{name}.jsonl", rows)
    curves = curves_of(read_entries([tmp_path / "before.jsonl", tmp_path / "after.jsonl"]))
    assert list(curves.values()) == [
        [Point(4, 31), Point(8, 32)],
        [Point(1, 31), Point(2, 32)],
    ]


def test_variants_of_one_name_in_two_presets_are_two_curves(entries):
    found = entries(
        *(row(preset="masks", variant="haar", place={"w": w}, bytes=w) for w in (1, 2)),
        *(row(preset="none", variant="haar", place={"w": w}, bytes=9 * w) for w in (1, 2)),
    )
    assert sorted(len(points) for points in curves_of(found).values()) == [2, 2]
