"""``mwnerf profile``: attribution, floors, tables."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from nerfstudio.engine.trainer import Trainer
from torch.autograd import DeviceType

from masked_wavelet_nerf import floors, profile_report, profiling, tracing
from masked_wavelet_nerf.datamanager import WaveletDataManager
from masked_wavelet_nerf.floors import LOOK_UPS, Counts, Machine, Work
from masked_wavelet_nerf.model import MaskedWaveletModel
from masked_wavelet_nerf.profile_report import Table
from masked_wavelet_nerf.profiling import Case, Profile, ProfileError
from masked_wavelet_nerf.runs import RunError
from masked_wavelet_nerf.wavelet import make_transform

MACHINE = Machine(bandwidth=1e9, peak=1e10)
CASE = Case(size=16, rays=64, device="cpu", threads=None, repeats=2, machine=MACHINE)


@pytest.fixture(scope="module")
def measurement():
    case = CASE.__class__(
        **{
            **vars(CASE),
            "ray_counts": (32, 64),
            "step_ratios": (0.5, 0.25),
            "thread_counts": (1, 2, 1),
        },
    )
    gc.collect()  # what other tests left is no library
    with contextlib.suppress(AttributeError):  # where it is not glibc's
        ctypes.CDLL(None).malloc_trim(0)
    return profiling.measure(case)


# --- measuring ------------------------------------------------------------------------------------


def test_parts_add_up_to_step_and_frame(measurement):
    for timing in (measurement.step, measurement.frame):
        assert sum(part.seconds for part in timing.parts) == pytest.approx(timing.seconds)
        assert all(part.seconds >= 0 for part in timing.parts)
    assert {part.name for part in measurement.step.parts} == {*tracing.PARTS, tracing.REST}
    in_frame = {part.name for part in measurement.frame.parts}
    assert {tracing.MARCHING, tracing.DENSITY, tracing.NETWORKS, tracing.DATA} <= in_frame
    assert not in_frame & {tracing.TRANSFORM, tracing.OPTIMISER}  # planes are kept


def test_counts_and_memory_are_plausible(measurement):
    step, frame = measurement.step, measurement.frame
    assert (step.rays, frame.rays) == (64, profiling.FRAME_SIDE**2)
    assert 64 < step.density_samples < 64 * 60
    assert 0 < step.coloured_samples < step.density_samples
    assert measurement.resolution == (16, 16, 16)
    assert 0.02 < measurement.kept < 0.2
    # Memory of earlier tests may still be returned while this one measures.
    assert 0 < measurement.library_bytes <= 1.1 * measurement.render_peak_bytes
    assert measurement.train_peak_device_bytes == 0
    assert measurement.first_picture_seconds > 0


def test_rays_and_samples_are_varied(measurement):
    found = {(v.rays, v.step_ratio): v for v in measurement.variations}
    assert set(found) == {(32, 0.5), (64, 0.5), (64, 0.25)}
    assert found[64, 0.5].seconds == measurement.step.seconds
    assert found[64, 0.25].density_samples > 1.5 * found[64, 0.5].density_samples
    assert found[32, 0.5].density_samples < 0.8 * found[64, 0.5].density_samples


def test_threads_are_compared_in_turn(measurement, monkeypatch):
    assert [t.threads for t in measurement.threadings] == [1, 2]
    before, used = torch.get_num_threads(), []

    def steps(trainer, count: int) -> list[float]:
        used.append(torch.get_num_threads())
        return [10.0 * used[-1] + len(used)] * count

    monkeypatch.setattr(profiling, "_step_seconds", steps)
    case = Case(**{**vars(CASE), "thread_counts": (3, 2)})
    found = profiling._vary_threads(object.__new__(Trainer), case)
    # A step to wake the threads, then those that count; eight times.
    assert used == [3, 3, 2, 2] * 8 and torch.get_num_threads() == before
    # Calls 2, 6, … 30 of three threads, 4, 8, … 32 of two.
    assert [(t.threads, t.seconds) for t in found] == [(3, 30 + 16), (2, 20 + 18)]
    rows = profile_report.tables(MACHINE, "cpu", 1, [replace(measurement, threadings=found)])
    assert rows[-1].title == "Threads, in turn"
    assert [row[2:] for row in rows[-1].rows] == [
        ("3", "46,000.0", "1.00"),
        ("2", "38,000.0", "1.21"),
    ]


def test_a_run_is_profiled_and_left_alone(tiny_config, train):
    trainer, _ = train(tiny_config(steps=10))
    trainer.config.save_config()
    base = trainer.config.get_base_dir()
    before = sorted(base.rglob("*"))
    case = Case(**{**vars(CASE), "load_config": base / "config.yml"})
    found = profiling.measure(case)
    assert found.resolution == trainer.pipeline.model.field.resolution
    assert found.step.rays == 96
    assert sorted(base.rglob("*")) == before
    with pytest.raises(RunError, match="no such file"):
        profiling.measure(Case(**{**vars(CASE), "load_config": base / "none.yml"}))


def test_labels_are_taken_off_again(measurement):
    for owner, name, _ in tracing._LABELLED:
        method = getattr(owner, name)
        assert method.__qualname__.endswith(name)
        assert "labelled" not in str(method.__code__)
    assert "forward" not in vars(MaskedWaveletModel)
    assert "next_train" in vars(WaveletDataManager)


def test_shares_are_scaled_and_the_rest_makes_up_the_sum():
    parts = profiling.scaled_parts({"a": 2.0, "b": 1.0}, seconds=2.0, profiled_seconds=4.0)
    assert parts == {"a": 1.0, "b": 0.5, tracing.REST: 0.5}
    # Kernels that overlap may add up to more than the step: nothing becomes negative.
    parts = profiling.scaled_parts({"a": 3.0, "b": 1.0}, seconds=2.0, profiled_seconds=2.0)
    assert parts == {"a": 1.5, "b": 0.5, tracing.REST: 0.0}
    thirds = {str(i): 0.1 + i / 3 for i in range(12)}
    for seconds in (0.1, 0.2, 0.3, 0.7):
        parts = profiling.scaled_parts(thirds, seconds, profiled_seconds=1.0)
        assert 0 <= parts[tracing.REST] < 1e-12
        assert sum(parts.values()) == pytest.approx(seconds)


# --- attribution ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "part"),
    [
        ("_MaskedQuantiseBackward", tracing.TRANSFORM),
        ("_MergeBackward", tracing.TRANSFORM),
        ("_NativeFeaturesBackward", tracing.DENSITY),
        ("GridSampler2DBackward0", tracing.DENSITY),
        ("AddmmBackward0", tracing.NETWORKS),
        ("MmBackward0", tracing.NETWORKS),
        ("TBackward0", tracing.NETWORKS),
        ("ReluBackward0", tracing.NETWORKS),
        ("torch::autograd::AccumulateGrad", tracing.GRADIENTS),
        ("TransposeBackward0", tracing.RENDERING),
        ("ExpBackward0", tracing.RENDERING),
        ("MulBackward0", tracing.RENDERING),
    ],
)
def test_nodes_by_name(node, part):
    assert tracing.part_of_node(node) == part


def event(name, own, *children, number=-1):
    made = SimpleNamespace(
        name=name,
        own=own,
        sequence_nr=number,
        cpu_children=list(children),
        cpu_parent=None,
        device_type=DeviceType.CPU,
    )
    for child in children:
        child.cpu_parent = made
    return made


def spread(events):
    """All events of a tree, with start times in the order of a walk."""
    found = []

    def walk(one):
        one.time_range = SimpleNamespace(start=len(found))
        found.append(one)
        for child in one.cpu_children:
            walk(child)

    for root in events:
        walk(root)
    return found


def test_nested_parts_are_taken_off_and_gradients_follow_the_forward_pass():
    label, node = "mwnerf: ", "autograd::engine::evaluate_function: "
    features = event(label + tracing.APPEARANCE, 1.0, event("aten::mul", 2.0, number=7))
    colour = event(label + tracing.NETWORKS, 10.0, features, event("aten::addmm", 20.0, number=8))
    backward = [
        event(node + "AddmmBackward0", 100.0, event("AddmmBackward0", 200.0, number=8), number=8),
        event(node + "MulBackward0", 1000.0, number=7),  # by name it would be rendering
        event(node + "MulBackward0", 5000.0, number=99),  # by name alone
    ]
    events = spread([event("aten::add", 7.0), colour, *backward])
    seconds = tracing.attribute(events, lambda e: e.own)
    assert seconds[tracing.NETWORKS] == 330
    assert seconds[tracing.APPEARANCE] == 1003
    assert seconds[tracing.RENDERING] == 5000
    assert sum(seconds.values()) == 6333  # what no label covers is left to the caller


def test_the_last_operator_of_a_number_made_the_node():
    label, node = "mwnerf: ", "autograd::engine::evaluate_function: "
    events = spread(
        [
            event(label + tracing.DENSITY, 0.0, event("aten::detach", 0.0, number=3)),
            event(label + tracing.MARCHING, 0.0, event("aten::mul", 0.0, number=3)),
            event(node + "MulBackward0", 1.0, number=3),
        ]
    )
    seconds = tracing.attribute(events, lambda e: e.own)
    assert seconds[tracing.MARCHING] == 1


def test_gradients_of_look_ups_are_told_apart():
    weight = torch.ones(4, requires_grad=True)

    def work():
        with torch.profiler.record_function("mwnerf: " + tracing.APPEARANCE):
            product = weight * 2
        product.sum().backward()

    found = tracing.trace(work, torch.device("cpu"))
    assert found.seconds[tracing.APPEARANCE] > 0
    assert found.seconds[tracing.RENDERING] > 0  # the sum's gradient
    assert found.seconds[tracing.GRADIENTS] > 0
    assert found.seconds[tracing.DENSITY] == 0


# --- floors ---------------------------------------------------------------------------------------


def test_a_floor_is_what_takes_longer():
    assert Work(2e9, 1e9).floor(MACHINE) == 2.0
    assert Work(1e9, 3e10).floor(MACHINE) == 3.0


def test_operations_of_a_transform():
    haar = make_transform("wavelet", wavelet="haar", num_levels=2)
    # Two taps a value, one from either filter, in rows and in columns; 8·8 values, then 4·4.
    assert floors.transform_operations(haar, 3, (8, 8)) == 3 * (64 + 16) * 2 * (2 + 2)
    bior = make_transform("wavelet", wavelet="bior4.4", num_levels=1)
    assert floors.transform_operations(bior, 1, (16, 16)) == 256 * 2 * (2 * 8)
    dct = make_transform("dct")
    assert floors.transform_operations(dct, 2, (4, 6)) == 2 * 2 * (4 * 4 * 6 + 4 * 6 * 6)
    assert floors.transform_operations(make_transform("identity"), 2, (4, 6)) == 0
    assert floors.transform_operations(haar, 2, (4,)) == 0


COUNTS = Counts(
    rays=2,
    places=20,
    density_samples=10,
    coloured_samples=5,
    coefficients=1000,
    transform_operations=7000,
    density_values=300,
    appearance_values=700,
    density_components=3,
    appearance_components=6,
    appearance_features=6,
    look_up=LOOK_UPS["vm"],
    weights=50,
    parameters=2050,
)


def test_work_of_a_step_by_hand():
    found = floors.work(COUNTS, training=True)
    assert found[tracing.TRANSFORM] == (24 * 1000 + 8 * 1000, 18_000 + 14_000)
    assert found[tracing.MARCHING] == (64 + 20 + 240, 240)
    # 10 samples read 6 · 3 values each, of which there are 180 at most; the gradient is 300 values.
    assert found[tracing.DENSITY] == (2 * (4 * 180 + 120 + 40) + 4 * 300, (12 + 26) * 30)
    assert found[tracing.APPEARANCE] == (2 * (4 * 180 + 60 + 120) + 4 * 700, (12 + 26) * 30)
    assert found[tracing.NETWORKS] == (4 * (150 + 5 * 30), 6 * 50 * 5)
    assert found[tracing.OPTIMISER] == (28 * 2050, 14 * 2050)
    assert found[tracing.DATA] == (160, 60)
    assert set(found) < set(tracing.PARTS)


def test_work_of_a_frame_by_hand():
    found = floors.work(COUNTS, training=False)
    assert found[tracing.DENSITY] == (4 * 180 + 120 + 40, 12 * 30)
    assert found[tracing.NETWORKS] == (4 * (50 + 5 * 12), 2 * 50 * 5)
    assert found[tracing.RENDERING] == (20 * 15 + 48, 100 + 40)
    assert not set(found) & {tracing.TRANSFORM, tracing.OPTIMISER}


def test_counts_of_a_model(tiny_config, start):
    model = start(tiny_config(initial_resolution=16)).pipeline.model
    counts = floors.counts_of(model, 1, 2, 3, 4)
    assert counts.density_values == 3 * 3 * (16 * 16 + 16)
    assert counts.appearance_values == 3 * 4 * (16 * 16 + 16)
    assert counts.coefficients == counts.density_values + counts.appearance_values  # no padding
    assert (counts.density_components, counts.appearance_components) == (9, 12)
    assert counts.weights == 12 * 27 + 150 * 16 + 16 * 16 + 16 * 3
    assert counts.parameters == 2 * counts.coefficients + counts.weights + 16 + 16 + 3


def test_the_machine_is_measured():
    found = floors.measure_machine(torch.device("cpu"), repeats=1)
    assert 1e8 < found.bandwidth < 1e13
    assert 1e8 < found.peak < 1e15


# --- output ---------------------------------------------------------------------------------------


def test_markdown():
    table = Table("Sizes", ("voxels", "ms"), [("16³", "1.0"), ("32³", "2.5")])
    assert profile_report.markdown(table).splitlines() == [
        "**Sizes**",
        "",
        "| voxels | ms |",
        "| --- | ---: |",
        "| 16³ | 1.0 |",
        "| 32³ | 2.5 |",
    ]


def test_parts_table_ends_in_the_sum(measurement):
    table = profile_report.parts_table("A step", measurement.step)
    assert table.title.startswith("A step of 64 rays, ")
    assert table.rows[-1][0] == "all"
    assert len(table.rows) == len(measurement.step.parts) + 1
    assert all(len(row) == len(table.header) for row in table.rows)
    milliseconds = [float(row[1].replace(",", "")) for row in table.rows]
    assert sum(milliseconds[:-1]) == pytest.approx(milliseconds[-1], rel=0.02)
    assert milliseconds[:-1] == sorted(milliseconds[:-1], reverse=True)


def test_command_prints_json_or_markdown_and_draws(measurement, monkeypatch, capsys, tmp_path):
    cases = []

    def measured(case):
        cases.append(case)
        return measurement

    monkeypatch.setattr(profiling, "measure_apart", measured)
    monkeypatch.setattr(profiling, "measure_machine", lambda device: MACHINE)
    common = {"sizes": (32, 16), "scaling_size": 16, "device": "cpu", "threads": 1}
    Profile(**common, json=True, figure=tmp_path / "cost.png").main()
    row = json.loads(capsys.readouterr().out)
    assert row["machine"] == {"bandwidth": 1e9, "peak": 1e10}
    assert len(row["measurements"]) == 2
    parts = row["measurements"][0]["step"]["parts"]
    assert sum(p["seconds"] for p in parts) == pytest.approx(measurement.step.seconds)
    assert (tmp_path / "cost.png").stat().st_size > 1000
    assert [(c.size, bool(c.ray_counts)) for c in cases] == [(16, True), (32, False)]

    Profile(**common, markdown=True).main()
    printed = capsys.readouterr().out
    assert "**16³: one training step of 64 rays" in printed
    assert "| voxels | rays | step ratio | samples per ray | step, ms |" in printed
    Profile(**common).main()
    assert "inverse transform" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rays": 0}, "--rays: expected at least 1"),
        ({"repeats": 0}, "--repeats"),
        ({"threads": 0}, "--threads"),
        ({"thread_counts": (1, 0)}, "--thread-counts: expected at least 1"),
        ({"sizes": (4,)}, "--sizes: expected at least 8"),
        ({"sizes": ()}, "--sizes"),
        ({"step_ratios": (0.0,)}, "above 0"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ProfileError, match=message):
        Profile(**{"device": "cpu", **changes}).main()
