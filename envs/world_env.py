"""`WorldModelEnv`: a world as a Gymnasium environment: one session and a random stream; all else is pure."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding

from envs.options import (
    RENDER_MODES,
    EnvOptions,
    Observation,
    StepMode,
    batch_of_one,
    check_actions,
    check_device,
    check_max_chunks,
    check_reset_options,
    check_seed,
    keys_to_action,
    load_world,
    noop_action,
    observation_space,
    spec_of,
)
from envs.snapshot import Snapshot, check_snapshot, continue_snapshot
from envs.turn import (
    Info,
    Turn,
    begin,
    child_stream,
    choose_start,
    real_chunk,
    session_seed,
    turns,
)
from envs.window import Window, windows_available
from worldmodel import Chunk, InputError, Score, WorldModel, WorldState

Step = tuple[np.ndarray, float, bool, bool, dict[str, Any]]


class WorldModelEnv(gymnasium.Env[np.ndarray, Any]):
    """A learned world to step.

    Observation: ``step_mode="chunk"`` (F, height, width, 3) uint8, one chunk a step; ``"frame"`` (height,
    width, 3) uint8, one frame a step. Frame by frame, the action at a chunk's first frame holds for all F
    of it and those given at its later frames are checked and have no effect; the chunk's reward is split
    evenly and its flags come with its last frame. ``observation="latent"`` (chunk mode): (C, h, w) float32.

    ``info`` has finite Python numbers only, the same keys at reset and at every step: log_prob (nats of the
    chunk), bits_per_dim, action_gain (nats), sweeps, residual, context_frames, chunk (chunks since reset).
    Maps, latents and noise are on `last_chunk`.

    Args:
        world: a world that ships, a world directory (weights are read at the first reset, once a process)
            or a world.
        max_chunks: the episode is truncated after so many chunks; None for never.
        termination_threshold: the episode terminates where the termination head's probability is above it.
        guidance, temperature, context: see `worldmodel.Sampling`; None for the world's own.
        render_mode: "rgb_array" the newest frame; "rgb_array_list" all since the last call; "human" a window.
        device: "cpu", "cuda" or "cuda:N", for a world given by name or folder; None for a GPU if there is one, but the CPU
            for worlds of small frames, as those that ship.

    Raises:
        InputError: an option that is not one of its choices. CheckpointError: no such world.
    """

    metadata: dict[str, Any] = {
        "render_modes": [mode for mode in RENDER_MODES if mode != "human" or windows_available()],
        "render_fps": 20,
    }

    def __init__(
        self,
        world: str | Path | WorldModel = "pendulum",
        *,
        step_mode: StepMode = "chunk",
        observation: Observation = "pixels",
        max_chunks: int | None = 50,
        termination_threshold: float = 0.5,
        guidance: float | None = None,
        temperature: float | None = None,
        context: Literal["reencode", "rolling"] | None = None,
        render_mode: str | None = None,
        device: str | None = None,
    ) -> None:
        self.options = EnvOptions(
            step_mode, observation, termination_threshold, guidance, temperature, context, render_mode
        )
        self.max_chunks = check_max_chunks(max_chunks)
        self._source, self._device = world, check_device(world, device)
        self._loaded: WorldModel | None = None
        world_spec = spec_of(world)
        self.action_space = copy.deepcopy(world_spec.action_space)
        self.observation_space = observation_space(world_spec, self.options)
        self.render_mode = render_mode
        self.fps = world_spec.fps
        self.metadata = {**type(self).metadata, "render_fps": max(1, round(world_spec.fps))}
        self._window = Window(world_spec.name, world_spec.fps or 1.0) if render_mode == "human" else None
        self._unrendered: list[np.ndarray] = []
        self._session: tuple[WorldState, Turn, Chunk] | None = None

    # ---- what there is to see -------------------------------------------------------------------------
    @property
    def world(self) -> WorldModel:
        """The world, with this environment's sampler; loads the weights if nobody has."""
        if self._loaded is None:
            self._loaded = load_world(self._source, self.options, self._device)
        return self._loaded

    @property
    def state(self) -> WorldState:
        """The session after the current chunk. Raises ResetNeeded before the first reset."""
        return self._current()[0]

    @property
    def last_chunk(self) -> Chunk:
        """The current chunk with maps, latents and noise (B = 1). Raises ResetNeeded before a reset."""
        return self._current()[2]

    @property
    def new_frames(self) -> np.ndarray:
        """(n, height, width, 3) uint8: what the last reset or step brought; F in chunk mode, else 1."""
        return self._current()[1].new_frames(self.options)

    # ---- Gymnasium ------------------------------------------------------------------------------------
    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[np.ndarray, Info]:
        """Start an episode with real frames; the observation is the last of them.

        ``options``: ``prompt`` (a string, in worlds that take prompts; alone, the first chunk is imagined),
        and at most one of ``start="bank"`` (default: a clip of the world's bank, picked by the seed),
        ``bank_index`` (int), ``image`` (height, width, 3) uint8, ``clip`` (n, height, width, 3) uint8 (the
        last whole chunks of it), ``episode`` (dataset directory, index, first chunk: as many chunks as a
        bank clip has), ``snapshot`` (`Snapshot`: continues it with the chunk count at 0, and with new noise
        if a seed is given).

        Raises:
            InputError: an unknown option, or one that does not fit the world; a seed that is no integer.
        """
        source, seed = check_reset_options(options), check_seed(seed)
        rng = copy.deepcopy(self.np_random) if seed is None else seeding.np_random(seed)[0]
        if "snapshot" in source:
            state, turn, chunk, rng = continue_snapshot(
                self.world, source["snapshot"], self.options, None if seed is None else rng
            )
        else:
            start = choose_start(self.world, source, rng)
            state, chunk = begin(self.world, [start], [session_seed(rng)])
            turn = turns(chunk, [0], [self.max_chunks], self.options)[0]
        super().reset(seed=seed)
        self.np_random.bit_generator.state = rng.bit_generator.state
        self._unrendered.clear()
        self._enter((state, turn, chunk))
        return turn.observation(self.options), dict(turn.info)

    def step(self, action: Any) -> Step:
        """Imagine a chunk, or show the next frame of the current one; see the class for what comes back.

        Raises:
            InputError: an action of the wrong shape, type or range; nothing has changed then. ResetNeeded.
        """
        state, turn, chunk = self._current()
        lifted = batch_of_one(self.action_space, action)
        if turn.over:
            state, chunk = self.world.step(state, lifted)
            turn = turns(chunk, [int(turn.info["chunk"]) + 1], [self.max_chunks], self.options)[0]
        else:
            check_actions(self.world, lifted, 1)
            turn = turn.next_frame()
        self._enter((state, turn, chunk))
        return turn.outcome(self.options)

    def render(self) -> Any:
        """See ``render_mode``; None without one."""
        if self.render_mode == "rgb_array":
            return self.new_frames[-1].copy()
        if self.render_mode == "rgb_array_list":
            frames, self._unrendered = self._unrendered, []
            return frames
        return None

    def close(self) -> None:
        """Close the window, if there is one."""
        if self._window is not None:
            self._window.close()

    def get_keys_to_action(self) -> dict[tuple[int, ...], Any]:
        """Keys for `gymnasium.utils.play`: left / right for one torque, digits and arrows for discrete
        actions.

        Call it as ``play(env, noop=env.unwrapped.noop_action)``: its own default, 0, is no action of a Box.
        """
        return keys_to_action(self.action_space)

    @property
    def noop_action(self) -> Any:
        """What to do when no key is pressed."""
        return noop_action(self.action_space)

    # ---- the past and other futures -------------------------------------------------------------------
    def snapshot(self) -> Snapshot:
        """This moment, to return to; costs nothing, since states are never changed. Raises ResetNeeded."""
        state, turn, chunk = self._current()
        return Snapshot(
            state,
            turn,
            chunk,
            dict(copy.deepcopy(self.np_random.bit_generator.state)),
            self.world.fingerprint,
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Return to a snapshot exactly, random stream included.

        Raises:
            InputError: not a snapshot, or of another world or step mode.
        """
        check_snapshot(self.world, snapshot, self.options)
        self.np_random.bit_generator.state = copy.deepcopy(snapshot.rng)
        self._unrendered.clear()
        self._session = self.world.adopt(snapshot.state), snapshot.turn, snapshot.chunk

    def fork(self, n: int) -> list[WorldModelEnv]:
        """``n`` environments that share this past. The first continues as this one would, the others with
        other noise.

        Raises:
            InputError: n < 1. ResetNeeded.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise InputError(f"fork({n!r}): expected an integer of at least 1")
        state, turn, chunk = self._current()
        children, states = [], state.fork(n)
        for i in range(n):
            child = WorldModelEnv(
                self.world,
                step_mode=self.options.step_mode,
                observation=self.options.observation,
                max_chunks=self.max_chunks,
                termination_threshold=self.options.termination_threshold,
                guidance=self.options.guidance,
                temperature=self.options.temperature,
                context=self.options.context,
                render_mode=None if self.render_mode == "human" else self.render_mode,
            )
            child._loaded = self.world
            alone = states.select([i])
            child.np_random.bit_generator.state = child_stream(self.np_random, alone, i)
            child._session = alone, turn, chunk
            children.append(child)
        return children

    # ---- real frames and plans ------------------------------------------------------------------------
    def observe(self, frames: np.ndarray, action: Any = None) -> Step:
        """Advance by a real chunk (F, height, width, 3) uint8 caused by ``action`` (None: unknown); returns
        as `step`.

        The chunk counts as shown, in frame mode too: the observation is its last frame, the reward all of it.

        Raises:
            InputError: wrong shape, dtype or range, or frames of the current chunk still to show.
                ResetNeeded.
        """
        state, turn, _ = self._current()
        if not turn.over:
            raise InputError(
                f"{len(turn.frames) - turn.shown} frames of this chunk are still to show; step on first"
            )
        state, chunk = self.world.observe(state, real_chunk(self.world, frames)[None], self._known(action))
        turn = turns(chunk, [int(turn.info["chunk"]) + 1], [self.max_chunks], self.options)[0]
        turn = replace(turn, shown=len(turn.frames))
        self._enter((state, turn, chunk))
        observation = turn.observation(self.options)
        return observation, turn.reward, turn.terminated, turn.truncated, dict(turn.info)

    def score(self, frames: np.ndarray, action: Any = None, draws: int = 1) -> Score:
        """How likely a real chunk (F, height, width, 3) uint8 is next; see `WorldModel.score`."""
        return self.world.score(self.state, real_chunk(self.world, frames)[None], self._known(action), draws)

    def imagine(self, actions: Any) -> list[Chunk]:
        """The chunks (B = 1) that `step` would bring for actions (T, ...), or a dict of such; changes
        nothing.

        Raises:
            InputError: wrong shape, type or range. ResetNeeded.
        """
        return self.world.rollout(self.state, batch_of_one(self.action_space, actions))[1]

    # ---- parts ----------------------------------------------------------------------------------------
    def _current(self) -> tuple[WorldState, Turn, Chunk]:
        if self._session is None:
            raise ResetNeeded("call env.reset() first")
        return self._session

    def _known(self, action: Any) -> Any:
        return None if action is None else batch_of_one(self.action_space, action)

    def _enter(self, session: tuple[WorldState, Turn, Chunk]) -> None:
        self._session = session
        frames = session[1].new_frames(self.options)
        if self.render_mode == "rgb_array_list":
            self._unrendered += list(frames.copy())
        if self._window is not None:
            self._window.show(frames)
