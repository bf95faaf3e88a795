"""The registry: listing imports nothing, plugins are lazy, and names collide loudly."""

from __future__ import annotations

import subprocess
import sys
import types
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

import pytest
import torch

import hf_attn_patch as hap
from hf_attn_patch import registry
from hf_attn_patch.call.rules import SinkWindow
from hf_attn_patch.errors import ConfigError, RegistrationError, UnknownPatchError
from hf_attn_patch.patches import BUILTIN
from hf_attn_patch.registry import Patch, option

from .small import differ, inputs_of, model_of, output, refused, untouched


@pytest.fixture
def fresh_registry(monkeypatch):
    """A registry that has not looked around yet."""
    monkeypatch.setattr(registry, "_entries", {})
    monkeypatch.setattr(registry, "_scanned", False)
    monkeypatch.setattr(registry, "_unreadable", {})


@pytest.fixture
def plugins(monkeypatch, fresh_registry):
    """Installs fake distributions with entry points: ``plugins(("name", "module:Class", "distribution"), ...)``."""

    def install(*points):
        def entry_points(*, group):
            assert group == "hf_attn_patch.patches"
            return [
                types.SimpleNamespace(name=name, value=value, dist=types.SimpleNamespace(name=dist))
                for name, value, dist in points
            ]

        monkeypatch.setattr(metadata, "entry_points", entry_points)

    return install


def plugin_module(monkeypatch, name: str, source: str) -> None:
    """A module `name` that exists only once it is imported."""
    import importlib.abc
    import importlib.util

    class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        def find_spec(self, wanted, path=None, target=None):
            return importlib.util.spec_from_loader(wanted, self) if wanted == name else None

        def exec_module(self, module):
            exec(compile(source, name, "exec"), module.__dict__)

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, name, raising=False)


PLUGIN = """
from dataclasses import dataclass
from hf_attn_patch.registry import Patch, option, register_patch
from hf_attn_patch.call.rules import SinkWindow

@register_patch("last_half")
@dataclass
class LastHalf(Patch):
    'Read only the last keys.'
    window: int = option(3, help="keys")
    def edit(self, program, call):
        program.restrict(SinkWindow(0, self.window), call.heads)
"""


@pytest.mark.parametrize("name", list(BUILTIN))
def test_builtin_table_says_what_the_class_says(name):
    target, summary, paper, arxiv, parts = BUILTIN[name]
    cls = registry.get(name)
    assert f"{cls.__module__}:{cls.__qualname__}" == target
    assert (cls.name, cls.summary, cls.paper, cls.arxiv, cls.parts) == (name, summary, paper, arxiv, parts)


def test_every_option_of_every_builtin_has_a_help_text():
    for name in BUILTIN:
        for row in registry.options_table(registry.get(name)):
            assert row["help"], f"{name}.{row['name']}"


def test_listing_in_a_fresh_process_imports_no_heavy_module():
    code = (
        "import sys, hf_attn_patch as hap; names = list(hap.available()); assert 'streaming' in names, names\n"
        "heavy = [m for m in ('torch', 'torch._dynamo', 'torch._inductor', 'triton', 'transformers', 'peft') "
        "if m in sys.modules]\n"
        "assert not heavy, heavy\n"
        "methods = [m for m in sys.modules if m.startswith('hf_attn_patch.patches.')]; assert not methods, methods\n"
        "assert all(e.summary for e in hap.available().values() if e.origin == 'hf_attn_patch')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_resolve_and_others_do_not():
    for name in hap.__all__:
        assert getattr(hap, name) is not None
    assert set(hap.__all__) <= set(dir(hap))
    with pytest.raises(AttributeError, match="no_such_name"):
        hap.no_such_name  # noqa: B018


def test_unknown_name_suggests_a_close_one():
    with refused(UnknownPatchError, "'steaming'", "'streaming'", "Available: ", "head_gate", "moa"):
        registry.get("steaming")


def test_entry_point_is_listed_without_being_imported(plugins, monkeypatch):
    plugin_module(monkeypatch, "lazy_plugin", PLUGIN)
    plugins(("last_half", "lazy_plugin:LastHalf", "lazy-plugin"))
    assert hap.available()["last_half"].origin == "lazy-plugin (entry point lazy_plugin:LastHalf)"
    assert "lazy_plugin" not in sys.modules
    assert registry.get("last_half").summary == "Read only the last keys"
    assert "lazy_plugin" in sys.modules


def test_plugin_that_was_imported_first_does_not_collide_with_its_own_entry_point(plugins, monkeypatch):
    plugin_module(monkeypatch, "early_plugin", PLUGIN)
    plugins(("last_half", "early_plugin:LastHalf", "early-plugin"))
    import early_plugin

    assert registry.get("last_half") is early_plugin.LastHalf
    assert hap.available()["last_half"].summary


def test_collision_names_both_origins_every_time_and_concerns_nobody_else(plugins):
    plugins(("mine", "a.b:Mine", "package-a"), ("mine", "c.d:Mine", "package-c"))
    for _ in range(2):
        with refused(RegistrationError, "'mine'", "package-a", "package-c", "Rename"):
            registry.get("mine")
        assert "package-c" in str(hap.available()["mine"])
        assert registry.get("streaming").name == "streaming"
    assert len(registry.problems()) == 1


def test_built_in_wins_over_an_entry_point_of_its_name_and_says_so(plugins):
    plugins(("streaming", "evil.pkg:Other", "evil-package"), ("streaming", "more.pkg:Other", "more"))
    for name in ("head_gate", "streaming"):
        with hap.patched(model_of("llama"), name):
            pass
    assert registry.get("streaming").__module__.startswith("hf_attn_patch.")
    assert "evil-package" in str(hap.available()["streaming"])
    assert [w in p for w, p in zip(("evil-package", "more"), registry.problems())] == [True, True]


def test_list_names_broken_plugins(plugins):
    from typer.testing import CliRunner

    from hf_attn_patch.cli.app import app

    plugins(
        ("mine", "a.b:Mine", "package-a"), ("mine", "c.d:Mine", "package-c"), ("with.dot", "e.f:G", "dotted")
    )
    shown = CliRunner().invoke(app, ["list"], env={"COLUMNS": "200"}).output
    assert "package-a" in shown and "package-c" in shown and "'with.dot'" in shown and "streaming" in shown
    assert "with.dot" not in hap.available()
    with refused(RegistrationError, "'with.dot'", "dotted", "identifier"):
        registry.get("with.dot")


def test_unreadable_metadata_of_some_package_leaves_the_built_ins(monkeypatch, fresh_registry):
    def broken(**_):
        raise ValueError("no Name in METADATA")

    monkeypatch.setattr(metadata, "entry_points", broken)
    assert registry.get("streaming").name == "streaming"
    assert "no Name in METADATA" in registry.problems()[0]


def test_an_entry_point_whose_distribution_cannot_be_read_is_named(monkeypatch, fresh_registry):
    class Point:
        name, value = "odd", "odd.pkg:Odd"

        @property
        def dist(self):
            raise OSError("metadata is gone")

    monkeypatch.setattr(metadata, "entry_points", lambda **_: [Point()])
    assert registry.get("head_gate").name == "head_gate" and "odd" not in hap.available()
    assert "metadata is gone" in registry.problems()[0]


def test_plugin_that_exits_while_importing_names_its_package(plugins, monkeypatch):
    plugin_module(monkeypatch, "quitter", "raise SystemExit(3)")
    plugins(("quits", "quitter:X", "quitting-package"))
    with refused(RegistrationError, "quitting-package", "SystemExit"):
        registry.get("quits")


def test_many_threads_may_scan_and_register_at_once(plugins, monkeypatch):
    import threading
    import time

    plugins(*((f"lazy{i}", f"lazy_{i}:X", "lazies") for i in range(20)))
    whole, failures, start = metadata.entry_points, [], threading.Barrier(8)

    def slow(*, group):
        time.sleep(0.02)  # the scan is caught half-way by the others
        return whole(group=group)

    monkeypatch.setattr(metadata, "entry_points", slow)

    def work(number):
        try:
            start.wait()
            own = dataclass(type(f"Own{number}", (Patch,), {"__doc__": "Own.", "__module__": f"m{number}"}))
            registry.register_patch(f"own{number}")(own)
            assert {"streaming", "lazy0", "lazy19", f"own{number}"} <= set(hap.available())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not failures
    assert {f"own{n}" for n in range(8)} <= set(hap.available())


@pytest.mark.parametrize("scan_first", [True, False])
def test_nobody_can_take_the_name_of_a_builtin(fresh_registry, scan_first):
    if scan_first:
        hap.available()

    @dataclass
    class Other(Patch):
        """Another method."""

    with refused(RegistrationError, "'streaming'", "hf_attn_patch", "test_registry.py"):
        registry.register_patch("streaming")(Other)
        hap.available()


@pytest.mark.parametrize(
    "target, words",
    [
        ("no_such_module_anywhere:X", ["ModuleNotFoundError"]),
        ("hf_attn_patch.call.rules:NoSuchClass", ["NoSuchClass"]),
        ("hf_attn_patch.call.rules:SinkWindow", ["not a Patch dataclass"]),
        ("hf_attn_patch.registry:option", ["not a Patch dataclass"]),
    ],
)
def test_entry_point_that_leads_nowhere_names_its_package(plugins, target, words):
    plugins(("broken", target, "broken-package"))
    assert "broken" in hap.available()  # listing still works, and so do the others
    assert registry.get("streaming").name == "streaming"
    with refused(RegistrationError, "'broken'", "broken-package", *words):
        registry.get("broken")


def test_plugin_that_fails_while_importing_names_its_package(plugins, monkeypatch):
    plugin_module(monkeypatch, "angry_plugin", "raise ValueError('needs a GPU')")
    plugins(("angry", "angry_plugin:X", "angry-package"))
    with refused(RegistrationError, "angry-package", "ValueError: needs a GPU"):
        registry.get("angry")


def test_subclass_without_dataclass_decorator_is_refused(fresh_registry):
    @registry.register_patch("plain_class")
    class Plain(Patch):
        window: int = 3

    with refused(RegistrationError, "plain_class", "@dataclass"):
        registry.get("plain_class")


@pytest.mark.parametrize("name", ["", "with.dot", "with space", "2d"])
def test_patch_name_must_be_an_identifier(fresh_registry, name):
    with refused(RegistrationError, repr(name)):
        registry.register_patch(name)(type("X", (Patch,), {}))


def test_a_method_of_the_user_works_end_to_end(fresh_registry, tmp_path):
    @registry.register_patch("last_half")
    @dataclass
    class LastHalf(Patch):
        """Read only the last `window` keys."""

        default_part = "text"
        window: int = option(3, help="keys that stay visible")

        def validate(self):
            self.require(self.window >= 1, "window", ">= 1")

        def edit(self, program, call):
            program.restrict(SinkWindow(0, self.window), call.heads)

    model = model_of("llama")
    inputs = inputs_of(model)
    dense = output(model, inputs)
    with untouched(model), refused(ConfigError, "last_half", "window=0"):
        hap.patch(model, "last_half", window=0)
    with untouched(model, inputs):
        with hap.patched(model, "last_half", window=2) as handle:
            edited = output(model, inputs)
            assert differ(edited, dense)
            handle.save(tmp_path)
        loaded = hap.load(model, tmp_path)
        assert torch.equal(output(model, inputs), edited)
        loaded.remove()
        with hap.patched(model, LastHalf(2)):
            assert torch.equal(output(model, inputs), edited)


def test_class_that_nobody_registered_is_refused():
    @dataclass
    class Nameless(Patch):
        """No name."""

    model = model_of("llama")
    with untouched(model), refused(ConfigError, "Nameless", "register_patch"):
        hap.patch(model, Nameless())


@dataclass
class Typed(Patch):
    """Options of every type."""

    name = "typed"
    whole: int = 1
    real: float = 1.0
    flag: bool = False
    text: str = "a"
    choice: Literal["x", "y"] = "x"
    maybe: int | None = None
    pair: tuple[int, float] = (1, 2.0)
    many: tuple[int, ...] = ()
    either: int | tuple[int, ...] = 1


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"real": 2}, 2.0),
        ({"maybe": None}, None),
        ({"maybe": 3}, 3),
        ({"pair": [1, 2]}, (1, 2.0)),
        ({"many": [1, 2, 3]}, (1, 2, 3)),
        ({"either": [4]}, (4,)),
        ({"choice": "y"}, "y"),
    ],
)
def test_json_values_become_the_declared_type(options, expected):
    value = getattr(Typed.from_dict(options), next(iter(options)))
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"whole": 1.0}, ["whole=1.0", "float", "int"]),
        ({"whole": True}, ["whole=True", "bool", "int"]),
        ({"whole": "1"}, ["whole='1'", "str", "int"]),
        ({"real": "1"}, ["real='1'", "float"]),
        ({"real": False}, ["real=False", "float"]),
        ({"flag": 1}, ["flag=1", "bool"]),
        ({"text": 3}, ["text=3", "str"]),
        ({"choice": "z"}, ["choice='z'", "'x', 'y'"]),
        ({"maybe": "no"}, ["maybe='no'"]),
        ({"pair": [1]}, ["pair=[1]"]),
        ({"many": 3}, ["many=3"]),
        ({"many": [1, "b"]}, ["many='b'"]),
        ({"either": "abc"}, ["either='abc'"]),
        ({"hole": 1}, ["unknown option 'hole'", "Did you mean 'whole'", "real, flag"]),
    ],
    ids=lambda v: str(v)[:30],
)
def test_wrong_type_names_option_value_and_expectation(options, words):
    with refused(ConfigError, "typed", *words):
        Typed.from_dict(options)
