"""Reading and writing files: all or nothing."""

from __future__ import annotations

import os
import stat

import pytest
from test_codec_scenes import PROFILES, make_scene

import masked_wavelet_codec as codec
from masked_wavelet_codec import files


def test_write_then_read(tmp_path):
    path = tmp_path / "scene.mwnf"
    assert codec.write(path, make_scene()) == path.stat().st_size
    assert path.read_bytes() == codec.encode(make_scene())  # the same profile, if none is named
    assert codec.equal(codec.read(path), make_scene())
    assert codec.equal(codec.read(os.fspath(path)), make_scene())
    assert os.listdir(tmp_path) == ["scene.mwnf"]


@pytest.mark.parametrize("profile", PROFILES)
def test_profile_is_passed_on(tmp_path, profile):
    path = tmp_path / "scene.mwnf"
    codec.write(path, make_scene(), profile)
    assert path.read_bytes() == codec.encode(make_scene(), profile)
    assert codec.describe(path.read_bytes()).profile == profile


def test_levels_are_passed_on(tmp_path):
    path = tmp_path / "scene.mwnf"
    codec.write(path, make_scene())
    read = codec.read(path, levels=1)
    assert codec.equal(read, codec.decode(path.read_bytes(), levels=1))
    assert not codec.equal(read, make_scene())


def test_overwrites(tmp_path):
    path = tmp_path / "scene.mwnf"
    path.write_bytes(b"old")
    codec.write(path, make_scene())
    assert codec.equal(codec.read(path), make_scene())
    assert os.listdir(tmp_path) == ["scene.mwnf"]


@pytest.mark.parametrize("had_old_file", [True, False])
@pytest.mark.parametrize("step", ["replace", "fsync", "write"])
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_failure_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, had_old_file, step, error):
    path = tmp_path / "scene.mwnf"
    if had_old_file:
        path.write_bytes(b"old")

    def fail(*_):
        raise error

    if step == "write":
        # Half of the bytes reach the disk, then it is full.
        def open_failing(*arguments):
            file = open(*arguments)  # noqa: SIM115
            write = file.write

            class Failing:
                def __enter__(self):
                    return self

                def __exit__(self, *_):
                    file.close()

                def write(self, data):
                    write(data[: len(data) // 2])
                    fail()

            return Failing()

        monkeypatch.setattr(files, "open", open_failing, raising=False)
    else:
        monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)):
        codec.write(path, make_scene())
    assert os.listdir(tmp_path) == (["scene.mwnf"] if had_old_file else [])
    assert not had_old_file or path.read_bytes() == b"old"


def test_scene_that_cannot_be_encoded_leaves_the_old_file(tmp_path):
    path = tmp_path / "scene.mwnf"
    path.write_bytes(b"old")
    with pytest.raises(codec.CodecError, match="profile"):
        codec.write(path, make_scene(), "fast")
    with pytest.raises(codec.CodecError, match="meta"):
        codec.write(path, make_scene(meta={"a": float("nan")}))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["scene.mwnf"]


def test_order_is_fsync_then_replace(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *a: (calls.append("fsync"), fsync(*a)))
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append("replace"), replace(*a)))
    codec.write(tmp_path / "scene.mwnf", make_scene())
    assert calls == ["fsync", "replace"]


def test_symbolic_link_is_followed(tmp_path):
    target = tmp_path / "target.mwnf"
    link = tmp_path / "link.mwnf"
    link.symlink_to(target)
    codec.write(link, make_scene())
    assert link.is_symlink()
    assert codec.equal(codec.read(target), make_scene())


def test_permissions_follow_the_umask(tmp_path):
    path, plain = tmp_path / "scene.mwnf", tmp_path / "plain"
    codec.write(path, make_scene())
    plain.write_bytes(b"")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_longest_name_that_the_file_system_takes(tmp_path):
    path = tmp_path / ("a" * 255)
    codec.write(path, make_scene())
    assert codec.equal(codec.read(path), make_scene())


def test_missing_folder_and_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        codec.write(tmp_path / "none" / "scene.mwnf", make_scene())
    with pytest.raises(FileNotFoundError):
        codec.read(tmp_path / "none.mwnf")


def test_file_larger_than_the_limit_is_not_read_to_its_end(tmp_path):
    path = tmp_path / "scene.mwnf"
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(codec.CodecError, match=r"is larger than the size limit 1000"):
        codec.read(path, size_limit=1000)


def test_limit_is_passed_on(tmp_path):
    path = tmp_path / "scene.mwnf"
    num_bytes = codec.write(path, make_scene())
    with pytest.raises(codec.CodecError, match="of the size limit"):
        codec.read(path, size_limit=num_bytes)
