"""`layers=` and `heads=`: every notation, and what is said about one that cannot be read."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from hf_attn_patch.errors import SelectionError
from hf_attn_patch.model.selection import indices, overrides, plain, settled

from .small import refused

NOTATIONS = [
    (None, [0, 1, 2, 3, 4, 5]),
    (2, [2]),
    (-1, [5]),
    (np.int64(3), [3]),
    (torch.tensor(3), [3]),
    ("2", [2]),
    ("-2", [4]),
    ("0-3", [0, 1, 2, 3]),
    ("1:3", [1, 2]),
    ("-2:", [4, 5]),
    (":", [0, 1, 2, 3, 4, 5]),
    ("::2", [0, 2, 4]),
    ("4:1:-1", [2, 3, 4]),
    ("4:100", [4, 5]),
    ("all", [0, 1, 2, 3, 4, 5]),
    ("*", [0, 1, 2, 3, 4, 5]),
    ("0-1,-2:", [0, 1, 4, 5]),
    (" 0 , 3-4 ", [0, 3, 4]),
    ("3,3,1", [1, 3]),
    (slice(1, None, 2), [1, 3, 5]),
    (slice(-2, None), [4, 5]),
    ([5, 0], [0, 5]),
    ((1, "3-4"), [1, 3, 4]),
    ({2, 1}, [1, 2]),
    (range(2), [0, 1]),
    (np.array([4, 0]), [0, 4]),
    (torch.tensor([1, 2]), [1, 2]),
    ([0, slice(4, None)], [0, 4, 5]),
    ([], []),
    ({"0-1": {}, 5: {}}, [0, 1, 5]),
    ({(0, 2): {}, "4:": {}}, [0, 2, 4, 5]),
]


@pytest.mark.parametrize("selector, expected", NOTATIONS, ids=lambda v: repr(v)[:40])
def test_notation_names_these_indices(selector, expected):
    assert indices(selector, 6, "layer") == expected


@pytest.mark.parametrize("selector, expected", NOTATIONS, ids=lambda v: repr(v)[:40])
def test_notation_means_the_same_after_json(selector, expected):
    saved = json.loads(json.dumps(plain(settled(selector))))
    assert indices(saved, 6, "layer") == expected


def test_one_time_iterables_are_read_more_than_once():
    once = settled(i for i in (0, 2))
    assert indices(once, 6, "layer") == indices(once, 6, "layer") == [0, 2]


@pytest.mark.parametrize(
    "selector, words",
    [
        (6, ["layer 6", "6, numbered 0 to 5"]),
        (-7, ["layer -7", "numbered 0 to 5"]),
        ("7", ["layer 7"]),
        ("4-6", ["layer 6"]),
        ([0, 9], ["layer 9"]),
        ({"9": {}}, ["layer 9"]),
        ("3-1", ["'3-1'", "backwards"]),
        ("", ["''", "0-3 (inclusive)"]),
        ("0,", ["''"]),
        ("first", ["'first'", "0-3 (inclusive)"]),
        ("-:", ["'-:'"]),
        ("1.5", ["'1.5'"]),
        ("0:4:0", ["step of 0"]),
        (slice(0, 4, 0), ["step of 0"]),
        (True, ["True"]),
        (1.5, ["float"]),
        (["a"], ["'a'"]),
    ],
    ids=lambda v: repr(v)[:30],
)
def test_unreadable_selector_says_what_it_was(selector, words):
    with refused(SelectionError, "layer", *words):
        indices(selector, 6, "layer")


@pytest.mark.parametrize("what", ["query head", "KV head"])
def test_message_says_which_kind_of_head(what):
    with refused(SelectionError, f"{what} 4 does not exist", "there are 4"):
        indices(4, 4, what)


def test_later_patterns_of_a_mapping_win():
    layers = {"0-3": {"window": 8, "sinks": 2}, 2: {"window": 4}}
    assert overrides(layers, 1, 6, "layer") == {"window": 8, "sinks": 2}
    assert overrides(layers, 2, 6, "layer") == {"window": 4, "sinks": 2}
    assert overrides(layers, 5, 6, "layer") == {}
    assert overrides("0-3", 1, 6, "layer") == {}


def test_mapping_to_something_else_than_options_is_refused():
    with refused(SelectionError, "'0-1'", "3", "dict of options"):
        overrides({"0-1": 3}, 0, 6, "layer")
