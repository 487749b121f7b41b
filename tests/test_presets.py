"""Presets: what a file says, what it takes over from another, and which runs it asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from masked_wavelet_nerf.cli import main
from masked_wavelet_nerf.demo import demo_preset
from masked_wavelet_nerf.presets import Preset, PresetError, flatten, load_preset

RUN = '[run]\nmethod = "m"\ndataparser = "d"\n'


@pytest.fixture
def write(tmp_path):
    def written(text: str, name: str = "p.toml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf8")
        return path

    return written


def words(preset: Preset) -> str:
    return " ".join(preset.arguments(Path("DATA")))


def test_tables_become_flags_in_their_order(write):
    preset = load_preset(
        write(
            '[about]\nsource = "x"\n'
            '[run]\nmethod = "m"\ndataparser = "d"\nthreads = 3\nscenes = ["b", "a"]\n'
            "[flags]\nsteps = 40\n[flags.one.two]\nrestarts = [5, 8]\nweight = 4e-9\nmasks = true\n"
            '"with.dots" = "word"\n'
            "[dataparser]\nscale-factor = 0.5\n[dataparser.inner]\nsize = 2\n"
            '[[paper]]\nscene = "b"\npsnr = 33.5\nmegabytes = 0.8\n',
            "name.toml",
        )
    )
    assert words(preset) == (
        "m --steps 40 --one.two.restarts 5 8 --one.two.weight 4e-09 --one.two.masks True "
        "--one.two.with.dots word --data DATA d --scale-factor 0.5 --inner.size 2"
    )
    assert (preset.name, preset.threads, preset.num_threads) == ("name", 3, 3)
    assert preset.scenes == ("b", "a")
    assert preset.about == {"source": "x"}
    assert preset.published("b", {}) == {"psnr": 33.5, "megabytes": 0.8}
    assert preset.exports == {"": {}}


def test_no_number_of_threads_means_all_cores(write, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 3, 5})
    preset = load_preset(write(RUN))
    assert (preset.threads, preset.num_threads) == (0, 3)


def test_a_base_holds_where_nothing_else_is_said(write):
    write(
        '[run]\nmethod = "m"\ndataparser = "d"\nthreads = 1\nscenes = ["s", "t"]\n'
        "[flags]\nsteps = 10\n[flags.model]\nbits = 8\nlevels = [1, 2, 3]\n[flags.model.deep]\n"
        "one = 1\ntwo = 2\n[dataparser]\nscale = 1\ncentre = 5\n",
        "base.toml",
    )
    path = write(
        '[run]\nbase = "../base.toml"\nthreads = 2\n'
        "[flags.model]\nlevels = [4]\nnew = 7\n[flags.model.deep]\ntwo = 20\n"
        "[dataparser]\nscale = 3\n",
        "folder/p.toml",
    )
    preset = load_preset(path)
    assert words(preset) == (
        "m --steps 10 --model.bits 8 --model.levels 4 --model.deep.one 1 --model.deep.two 20 "
        "--model.new 7 --data DATA d --scale 3 --centre 5"
    )
    assert (preset.name, preset.threads, preset.scenes) == ("p", 2, ("s", "t"))


def test_a_base_is_relative_to_the_file_that_names_it(write, monkeypatch, tmp_path):
    write(RUN + "[flags]\na = 1\nb = 1\nc = 1\n", "lowest.toml")
    write('[run]\nbase = "../lowest.toml"\n[flags]\nb = 2\nc = 2\n', "one/middle.toml")
    path = write('[run]\nbase = "../one/middle.toml"\n[flags]\nc = 3\n', "two/p.toml")
    write(RUN + "[flags]\nwrong = 1\n", "elsewhere/lowest.toml")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert words(load_preset(path)) == "m --a 1 --b 2 --c 3 --data DATA d"
    assert words(load_preset(Path("../two/p.toml"))) == "m --a 1 --b 2 --c 3 --data DATA d"


def test_a_flag_with_dots_and_a_nested_one_are_the_same_flag(write):
    write(RUN + '[flags]\n"model.bits" = 8\n[flags.other]\nlevels = 2\n', "base.toml")
    path = write(
        '[run]\nbase = "base.toml"\n[flags]\n"other.levels" = 3\n[flags.model]\nbits = 6\n'
    )
    assert flatten(load_preset(path).flags) == {"model.bits": 6, "other.levels": 3}


def test_what_is_not_a_table_takes_the_place_of_one(write):
    write(RUN + "[flags.model]\nbits = 8\n", "base.toml")
    path = write('[run]\nbase = "base.toml"\n[flags]\nmodel = "small"\n')
    assert words(load_preset(path)) == "m --model small --data DATA d"


def test_loops_of_bases_are_refused_by_name(write):
    itself = write('[run]\nbase = "p.toml"\n')
    with pytest.raises(PresetError, match=r"/p\.toml: \[run\] base 'p\.toml' leads back to itself"):
        load_preset(itself)
    write('[run]\nbase = "../b/two.toml"\n', "a/one.toml")
    write('[run]\nbase = "../b/../a/one.toml"\n', "b/two.toml")
    entry = write('[run]\nbase = "a/one.toml"\n', "entry.toml")
    with pytest.raises(PresetError, match=r"two\.toml: \[run\] base .*one\.toml' leads back"):
        load_preset(entry)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (None, r"gone\.toml: cannot be read: No such file"),
        ("[[[", r"gone\.toml: not TOML"),
        ("[strange]\n", r"gone\.toml: unknown tables \['strange'\]"),
    ],
)
def test_a_base_that_cannot_be_used_is_named(write, base, message):
    if base is not None:
        write(base, "gone.toml")
    with pytest.raises(PresetError, match=message):
        load_preset(write('[run]\nbase = "gone.toml"\n' + RUN[6:]))


def test_a_method_may_come_from_the_base_alone_but_must_come(write):
    write('[run]\nmethod = "m"\n', "base.toml")
    with pytest.raises(PresetError, match=r"p\.toml: \[run\] lacks 'dataparser'"):
        load_preset(write('[run]\nbase = "base.toml"\n'))


def test_every_variant_runs_through_the_whole_sweep(write):
    preset = load_preset(
        write(
            RUN + "[flags.model]\nbits = 8\nweight = 1.0\n"
            '[sweep]\n"model.weight" = [0.5, 2.0]\nsteps = [10, 20]\n'
            '[variants.plain]\n[variants."sym 4".model]\nwavelet = "sym4"\n'
        )
    )
    runs = list(preset.runs())
    places = [
        {"model.weight": weight, "steps": steps} for weight in (0.5, 2.0) for steps in (10, 20)
    ]
    assert [(name, place) for name, place, _ in runs] == [
        (name, place) for name in ("plain", "sym 4") for place in places
    ]
    assert [words(run) for _, _, run in runs] == [
        f"m --model.bits 8 --model.weight {weight} --steps {steps}{wavelet} --data DATA d"
        for wavelet in ("", " --model.wavelet sym4")
        for weight in (0.5, 2.0)
        for steps in (10, 20)
    ]


def test_a_run_is_one_run(write):
    preset = load_preset(
        write(
            RUN + "[flags]\na = 1\n[sweep]\na = [2, 3]\n[variants.x]\nb = 4\n"
            '[exports.small]\nprofile = "paper"\n[[paper]]\nscene = "s"\na = 3\npsnr = 30.0\n'
        )
    )
    for (_, place, run), a in zip(preset.runs(), (2, 3), strict=True):
        assert place == {"a": a}
        assert run.flags == {"a": a, "b": 4}
        ((name, nowhere, again),) = run.runs()
        assert (name, nowhere) == ("", {})
        assert again == run
        assert run.exports == {"small": {"profile": "paper"}}
        assert run.published("s", place) == ({"psnr": 30.0} if a == 3 else {})
    assert preset.flags == {"a": 1}


def test_a_preset_without_sweep_and_variants_is_one_run(write):
    preset = load_preset(write(RUN + "[flags.model]\nbits = 8\n"))
    ((name, place, run),) = preset.runs()
    assert (name, place) == ("", {})
    assert words(run) == words(preset) == "m --model.bits 8 --data DATA d"


def test_a_sweep_without_variants_runs_the_preset_as_it_is(write):
    preset = load_preset(write(RUN + "[flags]\na = 1\n[sweep]\nlevels = [[1, 2], [3]]\n"))
    assert [(name, place, words(run)) for name, place, run in preset.runs()] == [
        ("", {"levels": [1, 2]}, "m --a 1 --levels 1 2 --data DATA d"),
        ("", {"levels": [3]}, "m --a 1 --levels 3 --data DATA d"),
    ]


def test_a_variant_is_stronger_than_the_sweep_and_the_sweep_than_flags(write):
    preset = load_preset(
        write(
            RUN + "[flags.model]\nweight = 1\nbits = 8\n"
            '[sweep]\n"model.weight" = [2]\n'
            "[variants.a]\n[variants.b.model]\nweight = 3\nbits = 4\n"
        )
    )
    assert [words(run) for _, _, run in preset.runs()] == [
        "m --model.weight 2 --model.bits 8 --data DATA d",
        "m --model.weight 3 --model.bits 4 --data DATA d",
    ]


def test_exports_are_read_by_name(write):
    preset = load_preset(
        write(
            RUN + '[exports.b]\n[exports.a]\nprofile = "paper"\nallowed-loss = 0.05\nkeep = 0.1\n'
        )
    )
    assert list(preset.exports.items()) == [
        ("b", {}),
        ("a", {"profile": "paper", "allowed-loss": 0.05, "keep": 0.1}),
    ]


def test_published_numbers_are_of_a_scene_and_a_place_or_of_all(write):
    preset = load_preset(
        write(
            RUN + '[sweep]\n"model.weight" = [1e-9, 2e-9]\n'
            '[[paper]]\nscene = "a"\n"model.weight" = 1e-9\npsnr = 33.5\ndropped = 0.98\n'
            '[[paper]]\n"model.weight" = 1e-9\npsnr = 31.9\nmegabytes = 0.8\n'
            '[[paper]]\nscene = "b"\npsnr = 20.5\n'
        )
    )
    first, second = {"model.weight": 1e-9}, {"model.weight": 2e-9}
    assert preset.published("a", first) == {"psnr": 33.5, "dropped": 0.98}
    assert preset.published(None, first) == {"psnr": 31.9, "megabytes": 0.8}
    assert preset.published("a", second) == preset.published(None, second) == {}
    assert preset.published("b", first) == preset.published("b", second) == {"psnr": 20.5}
    assert preset.published("b", {}) == {"psnr": 20.5}
    assert preset.published("c", first) == {}
    assert preset.published("a", first | {"model.bits": 8}) == {"psnr": 33.5, "dropped": 0.98}


@pytest.mark.parametrize(
    ("tables", "named"),
    [
        ("[sweep]\nbits = 8\n", r"\[sweep\] bits"),
        ("[sweep]\nbits = []\n", r"\[sweep\] bits"),
        ('[sweep]\nbits = "468"\n', r"\[sweep\] bits"),
        ("[sweep.model]\nbits = [4, 6]\n", r"\[sweep\] model"),
        ("[exports.x]\nallowed_loss = 0.1\n", r"\[exports\.x\].*allowed-loss"),
        ('[exports.x]\nprofile = "zip"\n', r"\[exports\.x\].*profile \(range or paper\)"),
    ],
)
def test_sweeps_and_exports_that_are_none_are_refused_by_name(write, tables, named):
    with pytest.raises(PresetError, match=rf"/p\.toml: {named}"):
        load_preset(write(RUN + tables))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("run = 3\n", "run"),
        ("[run]\nbase = 3\n", "base"),
        (RUN + 'scenes = "lego"\n', "scenes"),  # not l, e, g, o
        (RUN + 'threads = "many"\n', "threads"),
        ("sweep = 3\n" + RUN, "sweep"),
        ("flags = 3\n" + RUN, "flags"),
        (RUN + "[variants]\nx = 3\n", "variants"),
        (RUN + "[exports]\nx = 3\n", "exports"),
        (RUN + '[exports.x]\nallowed-loss = "much"\n', "exports"),
        (RUN + "[exports.x]\nallowed-loss = -0.1\n", "exports"),
        (RUN + "[exports.x]\nkeep = 0\n", "exports"),
        (RUN + "[exports.x]\nkeep = 10\n", "exports"),
        (RUN + "[paper]\npsnr = 33.5\n", "paper"),
        (RUN + '[[paper]]\npsnr = "high"\n', "paper"),
    ],
)
def test_what_would_be_misread_or_fail_later_is_refused_by_name(write, content, named):
    with pytest.raises(PresetError, match=rf"/p\.toml: .*{named}"):
        load_preset(write(content))


def test_the_command_prints_what_ns_train_is_given(write, capsys):
    path = write(RUN + '[flags]\nname = "two words"\n[sweep]\nbits = [4]\n')
    assert main(["preset", str(path), "--data", "DATA"]) == 0
    assert capsys.readouterr().out == "ns-train m --name 'two words' --data DATA d\n"


def test_the_command_says_which_table_is_wrong(write, capsys):
    assert main(["preset", str(write("[run]\n")), "--data", "x"]) == 2
    assert "p.toml: [run] lacks 'method'" in capsys.readouterr().err


def test_the_sample_preset_is_what_the_demo_trains():
    preset = load_preset(Path(__file__).parent.parent / "configs/sample.toml")
    assert flatten(preset.flags) == flatten(demo_preset().flags)
