"""`WorldModelVectorEnv`: many sessions of a world in one batch, native to Gymnasium's `make_vec`.

Slot i equals a `WorldModelEnv` with slot i's seed: the same frames, rewards and flags, in every autoreset
mode.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from envs.options import (
    EnvOptions,
    Observation,
    StepMode,
    check_actions,
    check_device,
    check_reset_options,
    load_world,
    observation_space,
    spec_of,
)
from envs.slots import (
    check_autoreset,
    check_slots,
    masked_slots,
    pick,
    slot_actions,
    slot_horizons,
    slot_seeds,
)
from envs.snapshot import continue_snapshot
from envs.turn import (
    Turn,
    begin,
    choose_start,
    chunk_rows,
    concat_chunks,
    session_seed,
    turns,
)
from worldmodel import Chunk, WorldModel, WorldState

_Session = tuple[WorldState, list[Turn], Chunk]
VectorStep = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]


class WorldModelVectorEnv(VectorEnv[np.ndarray, Any, np.ndarray]):
    """A batch of sessions of one world; options as in `envs.world_env.WorldModelEnv`, without the window.

    Args:
        num_envs: slots.
        autoreset_mode: Gymnasium's NEXT_STEP, SAME_STEP (with ``final_obs`` and ``final_info``) or DISABLED
            (then reset with ``options={"reset_mask": ...}``), or its value as a string.
        max_chunks: horizon of every slot, or one for each.

    Raises:
        InputError: an option that is not one of its choices. CheckpointError: no such world.
    """

    metadata: dict[str, Any] = {
        "render_modes": ["rgb_array", "rgb_array_list"],
        "render_fps": 20,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        world: str | Path | WorldModel = "pendulum",
        num_envs: int = 1,
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        step_mode: StepMode = "chunk",
        observation: Observation = "pixels",
        max_chunks: int | None | Sequence[int | None] = 50,
        termination_threshold: float = 0.5,
        guidance: float | None = None,
        temperature: float | None = None,
        context: Literal["reencode", "rolling"] | None = None,
        render_mode: str | None = None,
        device: str | None = None,
    ) -> None:
        self.num_envs = check_slots(num_envs, render_mode)
        self.options = EnvOptions(
            step_mode, observation, termination_threshold, guidance, temperature, context, render_mode
        )
        self.max_chunks = slot_horizons(max_chunks, num_envs)
        self.autoreset_mode = check_autoreset(autoreset_mode)
        self._source, self._device = world, check_device(world, device)
        self._loaded: WorldModel | None = None
        world_spec = spec_of(world)
        self.single_action_space = copy.deepcopy(world_spec.action_space)
        self.single_observation_space = observation_space(world_spec, self.options)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.render_mode = render_mode
        self.metadata = {
            **type(self).metadata,
            "render_fps": max(1, round(world_spec.fps)),
            "autoreset_mode": self.autoreset_mode,
        }
        self._rngs: list[np.random.Generator | None] = [None] * num_envs
        self._session: _Session | None = None
        self._unrendered: list[list[np.ndarray]] = [[] for _ in range(num_envs)]

    @property
    def world(self) -> WorldModel:
        """The world, with this environment's sampler; loads the weights if nobody has."""
        if self._loaded is None:
            self._loaded = load_world(self._source, self.options, self._device)
        return self._loaded

    @property
    def state(self) -> WorldState:
        """The sessions, slot by slot, after their current chunks. Raises ResetNeeded before a reset."""
        return self._current()[0]

    @property
    def last_chunk(self) -> Chunk:
        """Each slot's current chunk with maps, latents and noise (B = num_envs). Raises ResetNeeded."""
        return self._current()[2]

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start episodes in all slots, or in those where ``options["reset_mask"]`` (num_envs,) bool is True.

        ``seed``: slot i gets ``seed + i``, or one for each. Other options: as `WorldModelEnv.reset`, for
        every slot.

        Raises:
            InputError: an unknown option, or one that does not fit. ResetNeeded: a mask before the first
                full reset.
        """
        given = dict(options or {})
        rows = masked_slots(given.pop("reset_mask", None), self.num_envs)
        source = check_reset_options(given)
        seeds = slot_seeds(seed, self.num_envs)
        if len(rows) < self.num_envs:
            self._current()
        session, rngs = self._begun(self._session, rows, seeds, source)
        self._enter(session, rngs)
        self._keep(rows)
        infos: dict[str, Any] = {}
        for row in rows:
            infos = self._add_info(infos, self._turns[row].info, row)
        return self._observations(), infos

    def step(self, actions: Any) -> VectorStep:
        """One step of every slot; where a slot is being reset (NEXT_STEP), its action is ignored.

        Raises:
            InputError: actions of the wrong shape, type or range; nothing has changed then.
            ResetNeeded: before the first reset, or (DISABLED) a finished slot was not reset.
        """
        state, before, chunk = self._current()
        finished = [b for b, turn in enumerate(before) if turn.over and (turn.terminated or turn.truncated)]
        if finished and self.autoreset_mode == AutoresetMode.DISABLED:
            raise ResetNeeded(f'slots {finished} are finished; reset them with options={{"reset_mask": ...}}')
        resetting = finished if self.autoreset_mode == AutoresetMode.NEXT_STEP else []
        fresh = [b for b, turn in enumerate(before) if turn.over and b not in resetting]
        after = [turn if turn.over else turn.next_frame() for turn in before]
        chosen = slot_actions(self.single_action_space, actions, self.num_envs)
        waiting = [b for b in range(self.num_envs) if b not in fresh and b not in resetting]
        if waiting:
            check_actions(self.world, pick(chosen, waiting), len(waiting))
        if fresh:
            every = len(fresh) == self.num_envs
            stepped, new = self.world.step(
                state if every else state.select(fresh), chosen if every else pick(chosen, fresh)
            )
            counts = [int(before[b].info["chunk"]) + 1 for b in fresh]
            made = turns(new, counts, [self.max_chunks[b] for b in fresh], self.options)
            for b, turn in zip(fresh, made, strict=True):
                after[b] = turn
            state, chunk = replace_rows(state, chunk, fresh, stepped, new)
        none: list[int | None] = [None] * self.num_envs
        session: _Session = (state, after, chunk)
        rngs: dict[int, np.random.Generator] = {}
        if resetting:
            session, rngs = self._begun(session, resetting, none, {})
        stepped_to = session[1]
        done: list[int] = []
        if self.autoreset_mode == AutoresetMode.SAME_STEP:
            done = [b for b, turn in enumerate(stepped_to) if any(turn.verdict(self.options)[1:])]
            if done:
                session, rngs = self._begun(session, done, none, {})
        return self._outcome(stepped_to, done, session, rngs)

    def render(self) -> tuple[Any, ...] | None:
        """Each slot's newest frame, or its list of frames since the last call; see ``render_mode``."""
        if self.render_mode == "rgb_array":
            return tuple(turn.new_frames(self.options)[-1].copy() for turn in self._current()[1])
        if self.render_mode == "rgb_array_list":
            frames, self._unrendered = self._unrendered, [[] for _ in range(self.num_envs)]
            return tuple(frames)
        return None

    # ---- parts ----------------------------------------------------------------------------------------
    def _current(self) -> _Session:
        if self._session is None:
            raise ResetNeeded("call reset() of the vector environment first")
        return self._session

    @property
    def _turns(self) -> list[Turn]:
        return self._current()[1]

    def _observations(self) -> np.ndarray:
        return np.stack([turn.observation(self.options) for turn in self._turns])

    def _outcome(
        self,
        reached: Sequence[Turn],
        done: Sequence[int],
        session: _Session,
        rngs: Mapping[int, np.random.Generator],
    ) -> VectorStep:
        """What `step` returns: the turns that were reached; slots ``done`` have begun anew since then (SAME_STEP)."""
        outcomes = [turn.outcome(self.options) for turn in reached]
        self._enter(session, rngs)
        self._keep(range(self.num_envs))
        infos: dict[str, Any] = {}
        for b, turn in enumerate(self._turns):
            if b in done:
                infos = self._add_info(infos, {"final_obs": outcomes[b][0], "final_info": outcomes[b][4]}, b)
            infos = self._add_info(infos, turn.info, b)
        rewards = np.array([o[1] for o in outcomes], dtype=np.float64)
        terminated, truncated = (np.array([o[k] for o in outcomes], dtype=np.bool_) for k in (2, 3))
        return self._observations(), rewards, terminated, truncated, infos

    def _begun(
        self,
        session: _Session | None,
        rows: Sequence[int],
        seeds: Sequence[int | None],
        source: Mapping[str, Any],
    ) -> tuple[_Session, dict[int, np.random.Generator]]:
        """``session`` with new episodes in the given slots, and their random streams; nothing changes here."""
        rngs = [self._stream(b, seeds[b]) for b in rows]
        if "snapshot" in source:
            parts = [
                continue_snapshot(
                    self.world, source["snapshot"], self.options, None if seeds[b] is None else rng
                )
                for b, rng in zip(rows, rngs, strict=True)
            ]
            state = WorldState.concat([p[0] for p in parts])
            made, chunk = [p[1] for p in parts], concat_chunks([p[2] for p in parts])
            rngs = [p[3] for p in parts]
        else:
            starts = [choose_start(self.world, source, rng) for rng in rngs]
            state, chunk = begin(self.world, starts, [session_seed(rng) for rng in rngs])
            made = turns(chunk, [0] * len(rows), [self.max_chunks[b] for b in rows], self.options)
        if session is not None and len(rows) < self.num_envs:
            state, chunk = replace_rows(session[0], session[2], rows, state, chunk)
            kept = list(session[1])
            for b, turn in zip(rows, made, strict=True):
                kept[b] = turn
            made = kept
        return (state, made, chunk), dict(zip(rows, rngs, strict=True))

    def _enter(self, session: _Session, rngs: Mapping[int, np.random.Generator]) -> None:
        """Make this the session; slots with new random streams have begun anew."""
        self._session = session
        for b, rng in rngs.items():
            self._rngs[b] = rng
            self._unrendered[b].clear()

    def _stream(self, row: int, seed: int | None) -> np.random.Generator:
        """A copy of the slot's random stream, or the stream of a seed."""
        current = self._rngs[row]
        return seeding.np_random(seed)[0] if seed is not None or current is None else copy.deepcopy(current)

    def _keep(self, rows: Sequence[int]) -> None:
        if self.render_mode == "rgb_array_list":
            for b in rows:
                self._unrendered[b] += list(self._turns[b].new_frames(self.options).copy())


def replace_rows(
    state: WorldState, chunk: Chunk, rows: Sequence[int], new: WorldState, new_chunk: Chunk
) -> tuple[WorldState, Chunk]:
    """A batch with its sessions ``rows`` replaced by new ones; K/V pages are shared, not copied."""
    if len(rows) == state.rows:
        return new, new_chunk
    others = [b for b in range(state.rows) if b not in set(rows)]
    place = {b: i for i, b in enumerate([*others, *rows])}
    order = [place[b] for b in range(state.rows)]
    joined = concat_chunks([chunk_rows(chunk, others), new_chunk])
    return WorldState.concat([state.select(others), new]).select(order), chunk_rows(joined, order)
