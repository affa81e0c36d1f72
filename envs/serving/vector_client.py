"""`RemoteVectorEnv`: many sessions on a world server as one Gymnasium vector environment, each with one request under
way at the same time; the server batches them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from envs.options import EnvOptions, Observation, StepMode
from envs.serving.connection import HIGH_WATER, Connection, Unanswered, client_keys
from envs.serving.remote import RemoteChunk, RemoteTurn, RemoteWorld
from envs.serving.session import RemoteSession, accept_all, close_all, exchange, reset_all
from envs.slots import (
    check_autoreset,
    check_slots,
    masked_slots,
    pick,
    slot_actions,
    slot_horizons,
    slot_seeds,
)
from worldmodel.condition.spaces import pack_actions

VectorStep = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]


class RemoteVectorEnv(VectorEnv[np.ndarray, Any, np.ndarray]):
    """Sessions of a world that `worldmodel serve` hosts, slot by slot as `envs.vector_env.WorldModelVectorEnv`.

    Args:
        url, key, server_key, timeout: as `envs.serving.client.RemoteEnv`; the others as the local class.

    Raises:
        InputError: an option that is not one of its choices. ServingError: as `RemoteEnv`. Where one slot fails, the
        others have taken their step; reset the slot, or all.
    """

    metadata: dict[str, Any] = {
        "render_modes": ["rgb_array", "rgb_array_list"],
        "render_fps": 20,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        url: str,
        num_envs: int = 1,
        *,
        key: str | Path | None = None,
        server_key: str | Path | None = None,
        timeout: float = 30.0,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        step_mode: StepMode = "chunk",
        observation: Observation = "pixels",
        max_chunks: int | None | Sequence[int | None] = 50,
        termination_threshold: float = 0.5,
        guidance: float | None = None,
        temperature: float | None = None,
        context: Literal["reencode", "rolling"] | None = None,
        render_mode: str | None = None,
    ) -> None:
        self.num_envs = check_slots(num_envs, render_mode)
        self.options = EnvOptions(
            step_mode, observation, termination_threshold, guidance, temperature, context, render_mode
        )
        self.max_chunks = slot_horizons(max_chunks, num_envs)
        self.autoreset_mode = check_autoreset(autoreset_mode)
        curve = client_keys(key, server_key)
        # a connection queues so many messages each way; more slots, more connections
        self._connections = [Connection(url, curve, timeout) for _ in range(0, num_envs, HIGH_WATER)]
        try:
            self.remote = [RemoteWorld.ask(connection) for connection in self._connections][0]
        except BaseException:
            self._close_connections()
            raise
        want = ("frames",) if observation == "latent" and render_mode is not None else ()
        self.sessions = [
            RemoteSession(self._connections[b // HIGH_WATER], self.options, self.max_chunks[b], want)
            for b in range(num_envs)
        ]
        self.single_action_space = copy.deepcopy(self.remote.action_space)
        self.single_observation_space = self.remote.observation_space(self.options)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.render_mode = render_mode
        self.metadata = {
            **type(self).metadata,
            "render_fps": max(1, round(self.remote.fps)),
            "autoreset_mode": self.autoreset_mode,
        }
        self._unrendered: list[list[np.ndarray]] = [[] for _ in range(num_envs)]

    @property
    def last_chunk(self) -> RemoteChunk:
        """Each slot's current chunk with maps, latents and noise (B = num_envs); asks the server."""
        chunks = [session.chunk() for session in self.sessions]
        names = [f.name for f in fields(RemoteChunk) if getattr(chunks[0], f.name) is not None]
        return RemoteChunk(**{name: np.concatenate([getattr(c, name) for c in chunks]) for name in names})

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """As `WorldModelVectorEnv.reset`; where a session was lost, a new one begins.

        Raises:
            InputError: an unknown option, or one that does not fit. ResetNeeded: a mask before the first full reset.
            ServingError: see the class.
        """
        given = dict(options or {})
        rows = masked_slots(given.pop("reset_mask", None), self.num_envs)
        seeds = slot_seeds(seed, self.num_envs)
        if len(rows) < self.num_envs and any(
            self.sessions[b].turn is None for b in set(range(self.num_envs)) - set(rows)
        ):
            raise ResetNeeded("call reset() of the vector environment first")
        self._reset_rows(rows, seeds, given)
        infos: dict[str, Any] = {}
        for row in rows:
            infos = self._add_info(infos, self._turn(row).info, row)
        return self._observations(), infos

    def step(self, actions: Any) -> VectorStep:
        """As `WorldModelVectorEnv.step`.

        Raises:
            InputError: actions of the wrong shape, type or range; nothing has changed then. ResetNeeded: before the
            first reset, or (DISABLED) a finished slot was not reset. ServingError: see the class.
        """
        finished = [b for b in range(self.num_envs) if self._turn(b).terminated or self._turn(b).truncated]
        if finished and self.autoreset_mode == AutoresetMode.DISABLED:
            raise ResetNeeded(f'slots {finished} are finished; reset them with options={{"reset_mask": ...}}')
        resetting = finished if self.autoreset_mode == AutoresetMode.NEXT_STEP else []
        stepping = [b for b in range(self.num_envs) if b not in resetting]
        chosen = self._checked(actions, stepping)
        unsettled = [b for b in stepping if self.sessions[b].unsettled]
        if unsettled:
            raise Unanswered(
                "conflict",
                f"whether slots {unsettled} took their last step is not known; reset them with "
                'options={"reset_mask": ...}, or all',
            )
        if (
            finished and self.autoreset_mode == AutoresetMode.SAME_STEP
        ):  # left so by a step that failed elsewhere
            self._reset_rows(finished, [None] * self.num_envs, {})
        # one that is reset and those that step are under way together
        starts = [
            partial(session.start_reset, None, None)
            if b in resetting
            else partial(session.start_step, chosen[b])
            for b, session in enumerate(self.sessions)
        ]
        accept_all(self.sessions, exchange(self.sessions, starts))
        return self._outcome(resetting)

    def render(self) -> tuple[Any, ...] | None:
        """Each slot's newest frame, or its list of frames since the last call; see ``render_mode``."""
        if self.render_mode == "rgb_array":
            return tuple(self._new_frames(b)[-1].copy() for b in range(self.num_envs))
        if self.render_mode == "rgb_array_list":
            frames, self._unrendered = self._unrendered, [[] for _ in range(self.num_envs)]
            return tuple(frames)
        return None

    def close_extras(self, **kwargs: Any) -> None:
        """Close the sessions and the connections."""
        close_all(self.sessions)
        self._close_connections()

    # ---- parts ----------------------------------------------------------------------------------------------------
    def _close_connections(self) -> None:
        for connection in self._connections:
            connection.close()

    def _turn(self, slot: int) -> RemoteTurn:
        turn = self.sessions[slot].turn
        if turn is None:
            raise ResetNeeded("call reset() of the vector environment first")
        return turn

    def _observations(self) -> np.ndarray:
        return np.stack([self._turn(b).observation for b in range(self.num_envs)])

    def _new_frames(self, slot: int) -> np.ndarray:
        turn = self._turn(slot)
        if self.options.observation == "latent":
            return turn.arrays["frames"]
        return turn.observation if self.options.step_mode == "chunk" else turn.observation[None]

    def _keep(self, rows: Sequence[int]) -> None:
        if self.render_mode == "rgb_array_list":
            for b in rows:
                self._unrendered[b] += list(self._new_frames(b).copy())

    def _reset_rows(
        self, rows: Sequence[int], seeds: Sequence[int | None], options: Mapping[str, Any]
    ) -> None:
        reset_all([self.sessions[b] for b in rows], [seeds[b] for b in rows], options)
        for b in rows:
            self._unrendered[b].clear()
        self._keep(rows)

    def _outcome(self, resetting: Sequence[int]) -> VectorStep:
        """What `step` returns, after the resets of SAME_STEP."""
        for b in resetting:
            self._unrendered[b].clear()
        outcomes = [self._turn(b) for b in range(self.num_envs)]
        rewards = np.array([turn.reward for turn in outcomes], dtype=np.float64)
        terminated = np.array([turn.terminated for turn in outcomes], dtype=np.bool_)
        truncated = np.array([turn.truncated for turn in outcomes], dtype=np.bool_)
        self._keep(range(self.num_envs))
        done = [int(b) for b in np.flatnonzero(terminated | truncated)]
        if self.autoreset_mode != AutoresetMode.SAME_STEP:
            done = []
        if done:
            self._reset_rows(done, [None] * self.num_envs, {})
        infos: dict[str, Any] = {}
        for b in range(self.num_envs):
            if b in done:
                last = {"final_obs": outcomes[b].observation.copy(), "final_info": dict(outcomes[b].info)}
                infos = self._add_info(infos, last, b)
            infos = self._add_info(infos, self._turn(b).info, b)
        return self._observations(), rewards, terminated, truncated, infos

    def _checked(self, actions: Any, slots: Sequence[int]) -> dict[int, Any]:
        """Each slot's action; all are checked here, so that none is sent where one is wrong."""
        rows = slot_actions(self.single_action_space, actions, self.num_envs)
        if slots:
            pack_actions(self.single_action_space, pick(rows, list(slots)), len(slots))
        return {b: pick(rows, b) for b in slots}
