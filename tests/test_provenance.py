"""Where rows come from: commits, versions, machines, and configurations without a path."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from masked_wavelet_nerf import provenance


@dataclass
class Leaf:
    rate: float = 0.5
    steps: tuple[int, ...] = (1, 2)
    target: type = Path
    where: Path = Path("/home/me")


@dataclass
class Tree:
    leaf: Leaf = field(default_factory=Leaf)
    name: str = "tree"
    nothing: None = None
    flag: bool = False
    folder: Path | None = Path("/home/me")
    folders: tuple[Path, ...] = (Path("/home/me"),)
    groups: dict[str, Any] = field(
        default_factory=lambda: {"a": {"optimizer": Leaf(rate=2.0), "scheduler": None}, "b": 3}
    )
    empty: list[int] = field(default_factory=list)
    function: Any = len


def test_a_configuration_is_all_its_numbers_and_names():
    found = provenance.configuration(Tree())
    assert found == {
        "leaf.rate": 0.5,
        "leaf.steps": [1, 2],
        "name": "tree",
        "nothing": None,
        "flag": False,
        "groups.a.optimizer.rate": 2.0,
        "groups.a.optimizer.steps": [1, 2],
        "groups.a.scheduler": None,
        "groups.b": 3,
        "empty": [],
    }
    assert json.loads(json.dumps(found)) == found


def test_the_configuration_of_a_run_names_no_path_of_this_machine(tiny_config, capture, tmp_path):
    found = provenance.configuration(tiny_config(steps=7))
    text = json.dumps(found)
    for part in (
        str(tmp_path),
        str(capture),
        capture.parent.name,
        str(Path.cwd()),
        str(Path.home()),
    ):
        assert part not in text
    assert found["max_num_iterations"] == 7
    assert found["pipeline.model.levels"] == 2
    assert found["pipeline.model.upsample_steps"] == [8, 13]
    assert found["optimizers.grids.optimizer.lr"] == 0.1
    assert found["optimizers.grids.scheduler.restarts"] == [8, 13]
    assert found["machine.seed"] == 42


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A package in a repository of its own; git in there."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    for name in ("masked_wavelet_nerf", "export", "docs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text("1\n")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "masked_wavelet_nerf" / "a.py"))
    for key in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(key, raising=False)

    def git(*words: str) -> str:
        who = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *who, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    provenance.commit.cache_clear()
    yield git
    provenance.commit.cache_clear()


def commit() -> str | None:
    provenance.commit.cache_clear()
    return provenance.commit()


def test_a_commit_has_a_plus_where_code_was_changed_since(repository, tmp_path):
    assert commit() is None  # not from git
    repository("init", "-q")
    assert commit() is None  # nor committed
    repository("add", ".")
    repository("commit", "-q", "-m", "one")
    head = repository("rev-parse", "HEAD")
    assert commit() == head[:12]
    for other in ("docs/a.py", "README.md"):
        (tmp_path / other).write_text("2\n")
    assert commit() == head[:12]
    for name in ("masked_wavelet_nerf", "export"):
        path = tmp_path / name / "a.py"
        path.write_text("2\n")
        assert commit() == f"{head[:12]}+", name
        path.write_text("1\n")
        assert commit() == head[:12]
    (tmp_path / "masked_wavelet_nerf" / "new.py").write_text("")
    assert commit() == f"{head[:12]}+"


def test_a_commit_is_of_the_code_and_not_of_where_it_runs(repository, tmp_path, monkeypatch):
    repository("init", "-q")
    repository("add", ".")
    repository("commit", "-q", "-m", "one")
    head = repository("rev-parse", "HEAD")
    elsewhere = tmp_path / "docs"
    monkeypatch.chdir(elsewhere)
    assert commit() == head[:12]
    monkeypatch.setattr(provenance, "__file__", str(elsewhere / "package" / "a.py"))
    assert commit() is None  # lies in somebody's repository, and is none


def test_without_git_there_is_no_commit(repository, monkeypatch):
    repository("init", "-q")
    repository("add", ".")
    repository("commit", "-q", "-m", "one")
    monkeypatch.setenv("PATH", "/nowhere")
    assert commit() is None


def test_versions_are_those_installed():
    found = provenance.versions()
    assert found["torch"] == version("torch")
    assert found["masked-wavelet-nerf"] == version("masked-wavelet-nerf")
    assert found["python"].count(".") == 2
    assert all(found.values())


def test_a_machine_has_no_name(monkeypatch):
    import socket

    provenance.machine.cache_clear()
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {1, 4, 5})
    found = provenance.machine()
    provenance.machine.cache_clear()
    assert set(found) == {"system", "processor", "cores"}
    assert found["cores"] == 3
    assert found["processor"] and socket.gethostname() not in json.dumps(found)
