"""Patches and tasks as text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from hf_attn_patch.errors import UnknownPatchError
from hf_attn_patch.eval import SpecError, TaskError, parse_patch_spec, parse_task_spec
from hf_attn_patch.eval.specs import format_spec, split_spec, typed_options


@dataclass
class Config:
    count: int = 1
    share: float = 0.5
    on: bool = False
    mode: Literal["token", "block"] = "token"
    limit: int | None = None
    window: int | tuple[int, ...] = 7
    sizes: tuple[int, ...] = ()
    plan: dict | str = ""
    _private: int = 0
    made: list[int] = field(default_factory=list, init=False)


def typed(**raw: str) -> dict:
    return typed_options("config", Config, raw, {})


def test_name_alone():
    assert parse_patch_spec("streaming").options == {}


def test_values_get_the_types_of_the_fields():
    spec = parse_patch_spec("streaming:sinks=4,window=256")
    assert spec.name == "streaming" and spec.options == {"sinks": 4, "window": 256}
    assert spec.label == "streaming(sinks=4, window=256)"


@pytest.mark.parametrize(
    "raw, value",
    [
        ({"count": "3"}, 3),
        ({"share": "1e-3"}, 0.001),
        ({"on": "true"}, True),
        ({"on": "off"}, False),
        ({"mode": "block"}, "block"),
        ({"limit": "null"}, None),
        ({"limit": "5"}, 5),
        ({"window": "9"}, 9),
        ({"window": "[3,5]"}, (3, 5)),
        ({"sizes": "[3,5]"}, (3, 5)),
        ({"sizes": "3"}, (3,)),
        ({"plan": "a/plan.json"}, "a/plan.json"),
        ({"plan": '{"alphas": [[1.0]]}'}, {"alphas": [[1.0]]}),
    ],
)
def test_every_kind_of_value(raw, value):
    (found,) = typed(**raw).values()
    assert found == value and type(found) is type(value)


def test_commas_inside_brackets_and_quotes_do_not_separate():
    name, raw = split_spec('moa:plan={"a": [1, 2], "b": "x,y"},sinks=3')
    assert name == "moa" and raw == {"plan": '{"a": [1, 2], "b": "x,y"}', "sinks": "3"}


def test_index_selections_may_hold_commas():
    assert parse_patch_spec("streaming:layers=0-3,-2:,window=8").options == {"layers": "0-3,-2:", "window": 8}


def test_a_selection_may_be_a_mapping_to_overrides():
    found = parse_patch_spec('swin_window:layers={"0::2":{},"1::2":{"shift":3}},window=7').options
    assert found == {"layers": {"0::2": {}, "1::2": {"shift": 3}}, "window": 7}
    assert parse_patch_spec(format_spec("swin_window", found)).options == found
    with pytest.raises(SpecError, match="layers"):
        parse_patch_spec("swin_window:layers=[1")


def test_scope_goes_with_the_options():
    spec = parse_patch_spec("streaming:window=8,heads=1,part=text,impl=torch,cache=keep")
    assert spec.options == {"window": 8, "heads": "1", "part": "text", "impl": "torch", "cache": "keep"}


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "no name"),
        (":window=4", "no name"),
        ("streaming:window", "'window' is not key=value"),
        ("streaming:window=4,5", "'5' is not key=value"),
        ("streaming:window=4,window=5", "given twice"),
        ("streaming:window=[4", "do not close"),
        ("streaming:window=4]", "do not close"),
        ("streaming:window=abc", "window='abc' is not an int"),
        ("streaming:window=1.5", "window='1.5' is not an int"),
        (
            "streaming:sink=4",
            r"no option 'sink'. Did you mean 'sinks'\? Options: sinks, window; where and how: part",
        ),
    ],
)
def test_bad_text_names_the_option_and_the_way_out(text, words):
    with pytest.raises(SpecError, match=words):
        parse_patch_spec(text)


@pytest.mark.parametrize(
    "raw, words",
    [
        ({"on": "maybe"}, "not true or false"),
        ({"mode": "row"}, "not one of token, block"),
        ({"sizes": "[1,true]"}, "sizes"),
        ({"sizes": '["a"]'}, "sizes"),
        ({"_private": "1"}, "no option '_private'"),
        ({"made": "[1]"}, "no option 'made'"),
    ],
)
def test_bad_values_are_refused(raw, words):
    with pytest.raises(SpecError, match=words):
        typed(**raw)


def test_unknown_patch_suggests_a_near_one():
    with pytest.raises(UnknownPatchError, match="Did you mean 'streaming'"):
        parse_patch_spec("streeming:window=4")


def test_tasks_use_the_same_syntax():
    task = parse_task_spec("passkey:lengths=[300,600],depths=[0.5],max_new_tokens=4")
    assert (task.lengths, task.depths, task.max_new_tokens) == ((300, 600), (0.5,), 4)


def test_unknown_task_suggests_a_near_one():
    with pytest.raises(TaskError, match="Did you mean 'perplexity'"):
        parse_task_spec("perplexit")


def test_what_is_written_is_read_back():
    options = {"sinks": 4, "window": 256, "layers": "0-3,-2:"}
    assert parse_patch_spec(format_spec("streaming", options)).options == options
    task = parse_task_spec("passkey:lengths=[300,600],depths=[0.5]")
    assert parse_task_spec(format_spec("passkey", task.to_dict()["config"])) == task
