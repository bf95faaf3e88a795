"""The open registry of tasks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hf_attn_patch.eval import Metric, Task, TaskError, available, register_task, registry


@pytest.fixture
def restored(monkeypatch):
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))


class Constant(Task):
    """A task for tests."""

    summary = "always 1"
    metrics = (Metric("score", "", True),)


def test_built_in_tasks_load_and_are_described():
    for name, entry in available().items():
        cls = entry.load()
        assert cls.name == name and entry.summary == cls.summary and cls.metrics


def test_decorator_makes_a_task_known(restored):
    register_task("constant")(Constant)
    assert registry.get("constant") is Constant
    assert "test_eval_registry.py" in available()["constant"].origin


def test_two_tasks_of_one_name_are_refused_with_both_origins(restored):
    with pytest.raises(TaskError, match=r"hf_attn_patch, one from .*test_eval_registry\.py"):
        register_task("perplexity")(Constant)


def test_registering_the_same_class_again_is_fine(restored):
    register_task("constant")(Constant)
    register_task("constant")(Constant)


def test_an_entry_that_is_no_task_is_refused(restored):
    registry._ENTRIES["odd"] = registry.TaskEntry("odd", "hf_attn_patch.env:environment", "", "a test")
    registry._ENTRIES["gone"] = registry.TaskEntry("gone", "hf_attn_patch.nowhere:X", "", "a test")
    with pytest.raises(TaskError, match="not a subclass of Task"):
        registry.get("odd")
    with pytest.raises(TaskError, match="'gone' .a test. cannot be loaded"):
        registry.get("gone")


def test_entry_points_are_found_lazily(restored, monkeypatch):
    class Point:
        name, value, dist = "plugin", "somewhere:Task", None

    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: [Point()])
    assert available()["plugin"].target == "somewhere:Task"


def test_listing_imports_no_task_and_no_torch():
    code = (
        "import sys; from hf_attn_patch.eval import available; available(); "
        "print('torch' in sys.modules, any('eval.perplexity' in m for m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.fixture
def installed(monkeypatch):
    """Fake entry points of any group: ``installed((name, value, distribution), ...)``."""
    from importlib import metadata
    from types import SimpleNamespace

    def install(*points):
        found = [SimpleNamespace(name=n, value=v, dist=SimpleNamespace(name=d)) for n, v, d in points]
        monkeypatch.setattr(metadata, "entry_points", lambda **_: found)

    return install


def others():
    from hf_attn_patch.calibration import calibrator
    from hf_attn_patch.decoding import base as decoding

    return [(registry, "perplexity", "passkey"), (calibrator, "moa", "duo"), (decoding, "vcd", "icd")]


@pytest.mark.parametrize("which", range(3), ids=["tasks", "calibrators", "decodings"])
def test_a_broken_plugin_concerns_nobody_else(which, restored, installed):
    house, first, second = others()[which]
    installed(
        (first, "evil.pkg:Other", "evil"),
        ("mine", "a.b:Mine", "package-a"),
        ("mine", "c.d:Mine", "package-c"),
        ("lost", "no_such_module:X", "lost-package"),
    )
    assert house.get(first).__module__.startswith("hf_attn_patch.")  # the built-in wins
    assert house.get(second)
    assert {"mine", "lost", first} <= set(house.available())
    for _ in range(2):
        with pytest.raises(Exception) as refusal:
            house.get("mine")
        assert "package-a" in str(refusal.value) and "package-c" in str(refusal.value)
    with pytest.raises((ValueError, RuntimeError), match="no_such_module"):
        house.get("lost")


@pytest.mark.parametrize("which", range(3), ids=["tasks", "calibrators", "decodings"])
def test_metadata_that_cannot_be_read_leaves_the_built_ins(which, restored, monkeypatch):
    from importlib import metadata

    def broken(**_):
        raise ValueError("no Name in METADATA")

    monkeypatch.setattr(metadata, "entry_points", broken)
    house, first, _ = others()[which]
    assert house.get(first)


@pytest.mark.parametrize("command", [["tasks"], ["calibrate"]], ids=str)
def test_lists_of_the_command_line_name_a_broken_plugin(restored, installed, command):
    from typer.testing import CliRunner

    from hf_attn_patch.cli.app import app

    installed(("mine", "a.b:Mine", "package-a"), ("mine", "c.d:Mine", "package-c"))
    shown = CliRunner().invoke(app, command, env={"COLUMNS": "250"})
    assert shown.exit_code == 0, shown.output
    assert "package-a" in shown.output and "mine" in shown.output
