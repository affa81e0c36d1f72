"""Action spaces as JSON and back, and actions packed to numbers between -1 and 1."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from worldmodel.condition.spaces import pack_actions, packed_size, space_from_json, space_to_json
from worldmodel.errors import ConfigError, InputError

pytestmark = pytest.mark.filterwarnings("error")

BOX = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 10.0], np.float32), dtype=np.float32)
SPACES: dict[str, spaces.Space[Any]] = {
    "discrete": spaces.Discrete(5),
    "discrete with a start": spaces.Discrete(3, start=-7),
    "multidiscrete": spaces.MultiDiscrete([3, 2, 4]),
    "multidiscrete with a start": spaces.MultiDiscrete([3, 2], start=[1, -4]),
    "multidiscrete 2-d": spaces.MultiDiscrete([[3, 2], [4, 2]]),
    "box": BOX,
    "box float64": spaces.Box(-0.1, 1 / 3, (2, 3), np.float64),
    "box unbounded": spaces.Box(-np.inf, np.inf, (2,), np.float32),
    "box half bounded": spaces.Box(np.array([0.0, -np.inf]), np.array([np.inf, 1.0]), dtype=np.float64),
    "box uint8": spaces.Box(0, 255, (4,), np.uint8),
    "box scalar": spaces.Box(-1.0, 1.0, (), np.float32),
    "dict": spaces.Dict({"b": spaces.Discrete(3), "a": BOX}),
    "nested dict": spaces.Dict({"x": spaces.Dict({"y": spaces.MultiDiscrete([2, 2])}), "z": BOX}),
}
every = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)


@every
def test_json_round_trip(space: spaces.Space[Any]) -> None:
    text = json.dumps(space_to_json(space), allow_nan=False)
    again = space_from_json(json.loads(text))
    assert again == space
    assert space_to_json(again) == space_to_json(space)
    if isinstance(space, spaces.Box):
        assert again.dtype == space.dtype  # type: ignore[attr-defined]


def test_text_round_trip() -> None:
    again = space_from_json(json.loads(json.dumps(space_to_json(spaces.Text(40)))))
    assert isinstance(again, spaces.Text) and again.max_length == 40
    assert again.contains("Push the red cube, gently!")
    assert packed_size(again) == 0


@pytest.mark.parametrize("space", [spaces.MultiBinary(3), spaces.Tuple((spaces.Discrete(2),))])
def test_other_spaces_are_refused(space: spaces.Space[Any]) -> None:
    with pytest.raises(ConfigError, match="use Discrete, MultiDiscrete, Box, Dict or Text"):
        space_to_json(space)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"kind": "Discrete"},
        {"kind": "Discrete", "n": "many"},
        {"kind": "Discrete", "n": 0},
        {"kind": "Tuple"},
        {"kind": "Box", "shape": [2], "dtype": "object", "low": ["0", "0"], "high": ["1", "1"]},
        {"kind": "Box", "shape": [3], "dtype": "float32", "low": ["0", "0"], "high": ["1", "1"]},
        {"kind": "Box", "shape": [1], "dtype": "float32", "low": ["__import__('os')"], "high": ["1"]},
        {"kind": "MultiDiscrete", "nvec": [0]},
        {"kind": "Dict", "spaces": {"a": {"kind": "?"}}},
        {"kind": "Dict", "spaces": [1]},
        [],
        "Discrete",
        None,
    ],
)
def test_a_bad_description_is_one_line(data: Any) -> None:
    with pytest.raises(ConfigError) as error:
        space_from_json(data)
    assert "\n" not in str(error.value)


@every
def test_samples_pack_to_their_size(space: spaces.Space[Any]) -> None:
    space.seed(0)
    samples = [space.sample() for _ in range(6)]
    packed = pack_actions(space, stack(samples), 6)
    assert packed.shape == (6, packed_size(space)) and packed.dtype == np.float32
    bounded = not any(np.isinf(b).any() for b in bounds(space))
    if bounded:
        assert (np.abs(packed) <= 1 + 1e-6).all()
    # rows are packed one by one
    for i in range(6):
        alone = pack_actions(space, stack(samples[i : i + 1]), 1)
        assert np.array_equal(alone[0], packed[i])


def bounds(space: spaces.Space[Any]) -> list[np.ndarray]:
    if isinstance(space, spaces.Dict):
        return [b for sub in space.spaces.values() for b in bounds(sub)]
    return [space.low, space.high] if isinstance(space, spaces.Box) else []


def stack(samples: list[Any]) -> Any:
    if isinstance(samples[0], dict):
        return {k: stack([s[k] for s in samples]) for k in samples[0]}
    return np.stack([np.asarray(s) for s in samples])


def test_discrete_is_one_hot_from_its_start() -> None:
    packed = pack_actions(spaces.Discrete(3, start=-7), np.array([-7, -5]), 2)
    assert packed.tolist() == [[1, 0, 0], [0, 0, 1]]


def test_multidiscrete_is_a_one_hot_for_each_part() -> None:
    packed = pack_actions(spaces.MultiDiscrete([2, 3]), np.array([[1, 2], [0, 0]]), 2)
    assert packed.tolist() == [[0, 1, 0, 0, 1], [1, 0, 1, 0, 0]]


def test_box_bounds_become_minus_one_and_one() -> None:
    packed = pack_actions(BOX, np.array([[-2.0, 0.0], [2.0, 10.0], [0.0, 7.5]], np.float32), 3)
    assert packed.tolist() == [[-1, -1], [1, 1], [0, 0.5]]
    free = pack_actions(SPACES["box unbounded"], np.array([[3.5, -1e6]], np.float32), 1)
    assert free.tolist() == [[3.5, -1e6]]


def test_dict_parts_come_in_the_order_of_the_space_whatever_order_they_are_given_in() -> None:
    space = SPACES["dict"]
    assert isinstance(space, spaces.Dict)
    a, b = np.array([[2.0, 5.0]], np.float32), np.array([1])
    expected = {"a": [1.0, 0.0], "b": [0.0, 1.0, 0.0]}
    packed = pack_actions(space, {"b": b, "a": a}, 1)
    assert packed[0].tolist() == [x for key in space.spaces for x in expected[key]]
    assert np.array_equal(packed, pack_actions(space, {"a": a, "b": b}, 1))
    again = space_from_json(json.loads(json.dumps(space_to_json(space))))
    assert np.array_equal(packed, pack_actions(again, {"a": a, "b": b}, 1))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None)
def test_every_integer_dtype_and_list_packs_alike(values: list[int]) -> None:
    space, rows = spaces.Discrete(5), len(values)
    expected = pack_actions(space, np.array(values), rows)
    for given_ in (values, np.array(values, np.int8), np.array(values, np.uint32)):
        assert np.array_equal(pack_actions(space, given_, rows), expected)


BAD: dict[str, tuple[spaces.Space[Any], Any]] = {
    "box: one row too few": (BOX, np.zeros((1, 2), np.float32)),
    "box: not batched": (BOX, np.zeros(2, np.float32)),
    "box: wrong width": (BOX, np.zeros((2, 3), np.float32)),
    "box: NaN": (BOX, np.array([[0, 0], [np.nan, 0]])),
    "box: infinite": (BOX, np.array([[0, 0], [np.inf, 0]])),
    "box: above": (BOX, np.array([[0, 0], [0, 10.1]])),
    "box: below": (BOX, np.array([[0, 0], [-2.1, 0]])),
    "box unbounded: NaN": (SPACES["box unbounded"], np.array([[0, 0], [np.nan, 0]])),
    "box unbounded: infinite": (SPACES["box unbounded"], np.array([[0, 0], [-np.inf, 0]])),
    "box: text": (BOX, np.array([["a", "b"], ["c", "d"]])),
    "box: complex": (BOX, np.zeros((2, 2), np.complex64)),
    "box: ragged": (BOX, [[0.0, 1.0], [0.0]]),
    "box: a dict": (BOX, {"a": np.zeros((2, 2))}),
    "box: an object": (BOX, object()),
    "box: None inside": (BOX, [None, None]),
    "box 2-d: above": (SPACES["box float64"], np.full((2, 2, 3), 0.4)),
    "box of many: NaN": (spaces.Box(-1, 1, (500,), np.float32), np.full((2, 500), np.nan)),
    "box unbounded: more than float32 holds": (SPACES["box half bounded"], np.array([[1e300, 0], [0, 0]])),
    "box: a tensor that requires grad": (BOX, torch.zeros(2, 2, requires_grad=True)),
    "discrete: float": (spaces.Discrete(3), np.array([0.0, 1.0])),
    "discrete: bool": (spaces.Discrete(3), np.array([True, False])),
    "discrete: above": (spaces.Discrete(3), np.array([0, 3])),
    "discrete: negative": (spaces.Discrete(3), np.array([-1, 0])),
    "discrete: below its start": (spaces.Discrete(3, start=5), np.array([5, 4])),
    "discrete: huge": (spaces.Discrete(3), np.array([0, 2**63 + 1], np.uint64)),
    "discrete: 2-d": (spaces.Discrete(3), np.array([[0], [1]])),
    "multidiscrete: above in one column": (spaces.MultiDiscrete([3, 2]), np.array([[2, 1], [2, 2]])),
    "multidiscrete: wrong width": (spaces.MultiDiscrete([3, 2]), np.array([[2], [2]])),
    "dict: missing key": (SPACES["dict"], {"a": np.zeros((2, 2))}),
    "dict: extra key": (SPACES["dict"], {"a": np.zeros((2, 2)), "b": np.zeros(2, int), "c": 0}),
    "dict: keys of two types": (SPACES["dict"], {1: np.zeros((2, 2)), "b": np.zeros(2, int)}),
    "dict: an array": (SPACES["dict"], np.zeros((2, 2))),
    "dict: a bad part": (SPACES["dict"], {"a": np.zeros((2, 2)), "b": np.array([0, 9])}),
}


@pytest.mark.parametrize(("space", "actions"), BAD.values(), ids=BAD)
def test_bad_actions_are_one_line(space: spaces.Space[Any], actions: Any) -> None:
    with pytest.raises(InputError) as error:
        pack_actions(space, actions, 2)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_the_first_bad_row_is_named() -> None:
    with pytest.raises(InputError, match="row 2"):
        pack_actions(BOX, np.array([[0, 0], [0, 0], [0, 11], [0, 12]]), 4)
    with pytest.raises(InputError, match="row 1"):
        pack_actions(spaces.Discrete(3), np.array([0, 3, 4]), 3)
