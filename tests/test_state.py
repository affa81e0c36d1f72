"""A state on disk and in memory: what it costs, what it shares, and that it goes on elsewhere bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.full_disk import python, tiny_disk
from tests.sessions import actions, contents, pictures, same_chunk, small_world, unchanged, walk
from tests.toy import toy_world, write_toy
from worldmodel.errors import CheckpointError, InputError, WorldModelError
from worldmodel.sampling import Sampling
from worldmodel.state import WorldState
from worldmodel.world import WorldModel

ROLLING = Sampling(context="rolling")


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return small_world()


def sessions(world: WorldModel) -> dict[str, tuple[WorldState, Sampling]]:
    """States of every layout: fresh, within and past the window, forked, ragged, selected, rolled."""
    a = actions(2, 12)
    fresh = world.initial_state([1, 2])
    short, _, _ = walk(world, fresh, a[:, :4])
    full, _, _ = walk(world, short, a[:, 4:6])
    long, _, _ = walk(world, full, a[:, 6:])
    rolled, _, _ = walk(world, fresh, a, ROLLING)
    family = short.fork(3)
    grown, _, _ = walk(world, family, actions(6, 1, seed=3))
    seen, _ = world.observe(short, pictures(world, 2), a[:, 5])
    plain = Sampling()
    return {
        "fresh": (fresh, plain),
        "short": (short, plain),
        "full": (full, plain),
        "long": (long, plain),
        "rolled": (rolled, ROLLING),
        "forked": (family, plain),
        "forked and grown": (grown, plain),
        "ragged": (WorldState.concat([long, fresh, grown.select([5, 0])]), plain),
        "ragged and rolled": (WorldState.concat([rolled, short]), ROLLING),
        "observed": (seen, plain),
        "selected": (long.select([1, 0, 1]), plain),
    }


CONTINUE = """
import sys
from pathlib import Path
import numpy as np
import torch
from tests.sessions import actions, walk
from worldmodel.sampling import Sampling
from worldmodel.world import WorldModel

folder = Path(sys.argv[1])
torch.set_num_threads(int(sys.argv[2]))
world = WorldModel.load(folder / "world")
for file in sorted(folder.glob("*.state")):
    state = world.load_state(file)
    sampling = Sampling(context="rolling" if "rolled" in file.stem else "reencode")
    state, chunks, _ = walk(world, state, actions(state.rows, 8, seed=77), sampling)
    np.savez(
        folder / f"{file.stem}.npz",
        frames=torch.stack([c.frames for c in chunks]).numpy(),
        log_prob=torch.stack([c.log_prob for c in chunks]).numpy(),
        noise=torch.stack([c.noise for c in chunks]).numpy(),
        sweeps=torch.stack([c.sweeps for c in chunks]).numpy(),
        total=state.log_prob.numpy(),
    )
"""


def test_saved_sessions_go_on_in_another_process_bit_for_bit(tmp_path: Path) -> None:
    """Save, end the process, load in a new one, continue: frames and likelihoods of every kind of state."""
    world = WorldModel.load(write_toy(tmp_path / "world"))
    states = sessions(world)
    for name, (state, _) in states.items():
        world.save_state(state, tmp_path / f"{name}.state")
    done = python(CONTINUE, tmp_path, torch.get_num_threads())
    assert done.returncode == 0, done.stderr
    for name, (state, sampling) in states.items():
        state, chunks, _ = walk(world, state, actions(state.rows, 8, seed=77), sampling)
        with np.load(tmp_path / f"{name}.npz") as found:
            for key in ("frames", "log_prob", "noise", "sweeps"):
                expected = torch.stack([getattr(c, key) for c in chunks]).numpy()
                assert np.array_equal(found[key], expected), (name, key)
            assert np.array_equal(found["total"], state.log_prob.numpy())


def test_saving_is_pure_and_repeatable(world: WorldModel, tmp_path: Path) -> None:
    for name, (state, sampling) in sessions(world).items():
        before = contents(state)
        for file in ("a", "b"):
            world.save_state(state, tmp_path / file)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        assert unchanged(before, state), name
        again = world.load_state(tmp_path / "a")
        assert unchanged(before, again), name
        assert again.context.cache.frames == state.context.cache.frames
        a = actions(state.rows, 2, seed=5)
        _, mine, _ = walk(world, state, a, sampling)
        _, theirs, _ = walk(world, again, a, sampling)
        assert all(same_chunk(x, y) for x, y in zip(mine, theirs, strict=True)), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_shared_pages_are_saved_once(world: WorldModel, tmp_path: Path) -> None:
    state, _, _ = walk(world, world.initial_state([1]), actions(1, 5))
    world.save_state(state, tmp_path / "one")
    world.save_state(state.fork(100), tmp_path / "many")
    keys = state.context.cache.nbytes
    extra = (tmp_path / "many").stat().st_size - (tmp_path / "one").stat().st_size
    per_row = sum(t.numel() * t.element_size() for t in state._tensors().values())
    assert extra < 99 * per_row + 10_000 < 99 * (keys + per_row)


def test_nbytes_counts_shared_pages_once(world: WorldModel) -> None:
    state, _, _ = walk(world, world.initial_state([1]), actions(1, 5))
    counters = 5 * 8
    assert state.nbytes >= state.context.cache.nbytes + state.noisy.nbytes
    assert state.fork(50).nbytes <= state.nbytes + 49 * counters
    assert state.fork(50).context.cache.nbytes == state.context.cache.nbytes
    pair = WorldState.concat([state, state])
    assert pair.nbytes <= 2 * state.nbytes


def test_records_are_frozen(world: WorldModel) -> None:
    state = world.initial_state([1])
    for record in (state, state.context, state.context.cache, state.context.cache.cohorts[0]):
        name = fields(record)[0].name
        with pytest.raises(AttributeError):
            setattr(record, name, None)


def test_select_and_concat_are_inverse(world: WorldModel) -> None:
    state, _, _ = walk(world, world.initial_state([1, 2, 3]), actions(3, 7))
    apart = [state.select([i]) for i in range(3)]
    again = WorldState.concat(apart)
    for mine, theirs in zip(state._tensors().values(), again._tensors().values(), strict=True):
        assert torch.equal(mine, theirs)
    assert again.context_frames.tolist() == state.context_frames.tolist()
    assert torch.equal(state.select([-1]).noisy, state.select([2]).noisy)
    assert WorldState.concat([state]) is state
    assert state.fork(1) is state


@pytest.mark.parametrize("indices", [[3], [-4], [0, 1, 7]])
def test_select_out_of_range(world: WorldModel, indices: list[int]) -> None:
    with pytest.raises(IndexError, match="3 sessions"):
        world.initial_state([1, 2, 3]).select(indices)


@pytest.mark.parametrize("indices", [[True, False, True], [0.0, 1.0], [[0], [1]], ["0"]])
def test_a_mask_is_no_index(world: WorldModel, indices: list[object]) -> None:
    with pytest.raises(InputError, match="expected a sequence of integers"):
        world.initial_state([1, 2, 3]).select(indices)
    with pytest.raises(InputError, match="expected a sequence of integers"):
        world.initial_state([1, 2, 3]).select(np.array(indices))


def test_batches_of_nothing(world: WorldModel) -> None:
    with pytest.raises(InputError, match="no seeds"):
        world.initial_state([])
    with pytest.raises(InputError, match="expected at least one"):
        WorldState.concat([])
    with pytest.raises(IndexError, match="1 sessions"):
        world.initial_state([1]).select([])
    for seeds in ([1.9], ["1"], 0):
        for begin in (world.initial_state, world.reset):
            with pytest.raises(InputError, match="expected integers, one for each session"):
                begin(seeds)
    with pytest.raises(InputError, match="indices into a bank"):
        world.reset([1], starts=[0.9])


@pytest.mark.parametrize("seeds", [[1], [1, 2, 3]])
def test_each_session_gets_a_seed(world: WorldModel, seeds: list[int]) -> None:
    with pytest.raises(InputError, match=f"{len(seeds)} seeds for 2 sessions"):
        world.initial_state([1, 2]).reseed(seeds)


@pytest.mark.parametrize("n", [0, -1])
def test_fork_into_nothing(world: WorldModel, n: int) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        world.initial_state([1]).fork(n)


# ---- what is not a saved state -----------------------------------------------------------------------------
def one_line(call: Callable[[], object], match: str | None = None) -> None:
    with pytest.raises(CheckpointError, match=match) as error:
        call()
    assert isinstance(error.value, WorldModelError) and "\n" not in str(error.value)


@pytest.fixture
def saved(world: WorldModel, tmp_path: Path) -> Path:
    state, _, _ = walk(world, world.initial_state([1]), actions(1, 3))
    world.save_state(state, tmp_path / "state")
    return tmp_path / "state"


def test_truncated_states(world: WorldModel, saved: Path) -> None:
    whole = saved.read_bytes()
    for keep in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:keep])
        one_line(lambda: world.load_state(saved), "truncated or corrupt")
    saved.write_bytes(b"\x00" * len(whole))
    one_line(lambda: world.load_state(saved))
    saved.unlink()
    one_line(lambda: world.load_state(saved), "does not exist")
    saved.mkdir()
    one_line(lambda: world.load_state(saved))


def rewrite(saved: Path, change: Callable[[dict[str, torch.Tensor], dict[str, object]], None]) -> None:
    with safe_open(saved, framework="pt") as file:
        header = json.loads(file.metadata()["worldmodel_state"])
    tensors = {k: v.clone() for k, v in load_file(saved).items()}
    change(tensors, header)
    save_file(tensors, saved, {"worldmodel_state": json.dumps(header)})


def test_a_state_of_another_world(world: WorldModel, saved: Path, tmp_path: Path) -> None:
    other = toy_world(tmp_path / "other", seed=5)
    one_line(lambda: other.load_state(saved), "another world")
    same = toy_world(tmp_path / "same")
    assert same.fingerprint == world.fingerprint != other.fingerprint
    same.load_state(saved)


def test_a_state_of_another_format(world: WorldModel, saved: Path) -> None:
    rewrite(saved, lambda tensors, header: header.update(format=99))
    one_line(lambda: world.load_state(saved), "state format 99, expected 1")


def test_a_state_of_another_configuration(world: WorldModel, saved: Path, tmp_path: Path) -> None:
    """The weights are the same, the window is not."""
    path = write_toy(tmp_path / "wider")
    file = path / "world.json"
    file.write_text(file.read_text().replace('"window": 6', '"window": 7'))
    wider = WorldModel.load(path)
    assert wider.fingerprint == world.fingerprint and wider.flow.config.window == 7
    one_line(lambda: wider.load_state(saved), "does not fit this world's configuration")


def test_weights_are_not_a_state(world: WorldModel, tmp_path: Path) -> None:
    write_toy(tmp_path / "w")
    one_line(lambda: world.load_state(tmp_path / "w" / "flow.safetensors"), "not a saved world state")


@pytest.mark.parametrize(
    "key",
    ["u", "noisy", "latent", "seeds", "branches", "forks", "steps", "log_prob", "features", "cache.0.0"],
)
def test_states_with_something_missing(world: WorldModel, saved: Path, key: str) -> None:
    rewrite(saved, lambda tensors, header: tensors.__delitem__(key))
    why = "does not fit this world's configuration" if key == "features" else "not a saved world state"
    one_line(lambda: world.load_state(saved), why)


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"cache": [{"rows": 1}]},
        {"cache": 3},
        {"cache": []},
        {"cache": [{"rows": 2, "frames": 3, "first": 0, "prefix": 0, "folds": [1]}]},
        {"cache": [{"rows": 1, "frames": 3, "first": 0, "prefix": 0, "folds": [1, 1]}]},
        {"cache": [{"rows": 1, "frames": 2, "first": 0, "prefix": 0, "folds": [1]}]},
    ],
)
def test_states_whose_layout_does_not_fit(world: WorldModel, saved: Path, layout: dict[str, object]) -> None:
    rewrite(saved, lambda tensors, header: header.update(layout=layout))
    one_line(lambda: world.load_state(saved), "not a saved world state")


@pytest.mark.parametrize("key", ["u", "noisy", "latent", "features", "seeds", "log_prob", "cache.0.0"])
def test_states_of_the_wrong_shape(world: WorldModel, saved: Path, key: str) -> None:
    rewrite(saved, lambda tensors, header: tensors.update({key: tensors[key][..., :0].contiguous()}))
    one_line(lambda: world.load_state(saved), "not a saved world state")


def test_states_of_other_numbers_than_this_worlds(world: WorldModel, saved: Path) -> None:
    """A grid with as many tokens would only move them, other dtypes end in a product, and noise counts from 0."""
    data = saved.read_bytes()
    for change, why in (
        (lambda t, h: h.update(grid=h["grid"][::-1] if h["grid"][0] != h["grid"][1] else [1, 4]), "grid"),
        (lambda t, h: t.update(latent=t["latent"].double()), "latent"),
        (lambda t, h: t.update(seeds=t["seeds"].float()), "seeds"),
        (lambda t, h: t.update(steps=-t["steps"] - 1), "below 0"),
    ):
        saved.write_bytes(data)
        rewrite(saved, change)
        one_line(lambda: world.load_state(saved), why)


# ---- a full disk -------------------------------------------------------------------------------------------
SAVE = """
import sys
from pathlib import Path
from tests.sessions import actions, walk
from worldmodel.errors import WorldModelError
from worldmodel.world import WorldModel

folder = Path(sys.argv[1])
world = WorldModel.load(folder / "world")
state = world.load_state(folder / "small")
big, _, _ = walk(world, state.fork(64), actions(64, 4))
try:
    world.save_state(big, folder / "small")
except WorldModelError as error:
    print(type(error).__name__, error)
"""


def test_the_old_state_survives_where_files_may_not_grow(tmp_path: Path) -> None:
    world = WorldModel.load(write_toy(tmp_path / "world"))
    state = world.initial_state([1])
    world.save_state(state, tmp_path / "small")
    before, listing = (tmp_path / "small").read_bytes(), sorted(tmp_path.iterdir())
    done = python(SAVE, tmp_path, file_size=len(before) + 20_000)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("CheckpointError cannot write") and done.stdout.count("\n") == 1
    assert (tmp_path / "small").read_bytes() == before and sorted(tmp_path.iterdir()) == listing


def test_the_old_state_survives_a_full_disk(world: WorldModel, tmp_path: Path) -> None:
    state, _, _ = walk(world, world.initial_state([1]), actions(1, 3))
    big, _, _ = walk(world, state.fork(64), actions(64, 2))
    with tiny_disk(tmp_path / "disk", 100) as disk:
        if disk is None:
            pytest.skip("mounting a small file system is not allowed here; the limit on file size is tested")
        file = disk / "session"
        world.save_state(state, file)
        before, kept = file.read_bytes(), contents(big)
        one_line(lambda: world.save_state(big, file), "cannot write .* is unchanged")
        assert file.read_bytes() == before and [p.name for p in disk.iterdir()] == ["session"]
        assert unchanged(kept, big)
        again = world.load_state(file)  # and it loads
        a = actions(1, 2, seed=5)
        _, mine, _ = walk(world, state, a)
        _, theirs, _ = walk(world, again, a)
        assert all(same_chunk(x, y) for x, y in zip(mine, theirs, strict=True))
