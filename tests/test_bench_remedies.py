"""Captures with known errors, which the benchmark of remedies trains on."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from masked_wavelet_nerf import bench_remedies as remedies
from masked_wavelet_nerf.datasets.sample import write_sample_capture


@pytest.fixture
def captures(tmp_path):
    """The same capture twice, tiny, with many cameras."""
    clean = write_sample_capture(tmp_path / "clean", image_size=6, num_train=60, num_test=1)
    return clean, shutil.copytree(clean, tmp_path / "copy")


def poses(capture, split):
    frames = json.loads((capture / f"transforms_{split}.json").read_text())["frames"]
    return np.array([frame["transform_matrix"] for frame in frames])


def photos(capture, split):
    paths = sorted((capture / split).glob("*.png"))
    return np.stack([np.asarray(Image.open(path)) for path in paths]).astype(float)


def test_cameras_for_training_are_turned_and_shifted(captures):
    clean, copy = captures
    remedies.disturb_cameras(copy)
    before, after = poses(clean, "train"), poses(copy, "train")
    turns = Rotation.from_matrix(after[:, :3, :3] @ before[:, :3, :3].transpose(0, 2, 1))
    assert np.sqrt((turns.magnitude() ** 2).mean()) == pytest.approx(
        math.radians(remedies.TURN), rel=0.15
    )
    assert (after - before)[:, :3, 3].std() == pytest.approx(remedies.SHIFT, rel=0.15)
    assert (poses(copy, "test") == poses(clean, "test")).all()
    assert (photos(copy, "train") == photos(clean, "train")).all()


def test_photos_for_training_have_a_brightness_of_their_own(captures):
    clean, copy = captures
    remedies.disturb_brightness(copy)
    before, after = photos(clean, "train"), photos(copy, "train")
    assert (after[..., 3] == before[..., 3]).all()
    factors = []
    for one, other in zip(before[..., :3], after[..., :3], strict=True):
        usable = (one > 60) & (other < 255)
        factors.append(np.median(other[usable] / one[usable]))
        expected = (one * factors[-1]).clip(max=255)
        assert np.abs(other - expected).max() < 4
    assert np.mean(factors) == pytest.approx(1, abs=0.08)
    assert remedies.DARKEST - 0.02 < min(factors) < 0.7 and 1.3 < max(factors) < 1.42
    assert (photos(copy, "test") == photos(clean, "test")).all()
    assert (poses(copy, "train") == poses(clean, "train")).all()
