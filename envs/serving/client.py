"""`RemoteEnv`: a world on a server as a Gymnasium environment, the same to its user as a local `WorldModelEnv`.

Light to import: no torch, no weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np

from envs.options import (
    RENDER_MODES,
    EnvOptions,
    Observation,
    StepMode,
    check_max_chunks,
    check_seed,
    keys_to_action,
    noop_action,
)
from envs.serving.connection import Connection, client_keys
from envs.serving.remote import RemoteChunk, RemoteScore, RemoteSnapshot, RemoteTurn, RemoteWorld
from envs.serving.session import RemoteSession, reset_all
from envs.window import Window, windows_available

Step = tuple[np.ndarray, float, bool, bool, dict[str, Any]]


class RemoteEnv(gymnasium.Env[np.ndarray, Any]):
    """A session of a world that `worldmodel serve` hosts; options, observations, rewards, flags and ``info`` are those
    of `envs.world_env.WorldModelEnv`, bit for bit.

    The session is made at the first reset and kept alive in the background. A broken connection is made anew and the
    request under way sent again; the server runs it once. `last_chunk`, `score` and `imagine` give NumPy arrays.

    Args:
        url: ``tcp://host:port``.
        key, server_key: files of `worldmodel keys new`, your own ``.secret`` and the server's ``.public``; None for a
            server on this machine without keys.
        timeout: seconds that a request may take, reconnections included.

    Raises:
        InputError: an option that is not one of its choices. ServingError: no server (``session_lost``), a failed
        handshake (``unauthorized``), or what the server answered; ``code`` says which.
    """

    metadata: dict[str, Any] = {
        "render_modes": [mode for mode in RENDER_MODES if mode != "human" or windows_available()],
        "render_fps": 20,
    }

    def __init__(
        self,
        url: str,
        *,
        key: str | Path | None = None,
        server_key: str | Path | None = None,
        timeout: float = 30.0,
        step_mode: StepMode = "chunk",
        observation: Observation = "pixels",
        max_chunks: int | None = 50,
        termination_threshold: float = 0.5,
        guidance: float | None = None,
        temperature: float | None = None,
        context: Literal["reencode", "rolling"] | None = None,
        render_mode: str | None = None,
    ) -> None:
        options = EnvOptions(
            step_mode, observation, termination_threshold, guidance, temperature, context, render_mode
        )
        horizon = check_max_chunks(max_chunks)
        connection = Connection(url, client_keys(key, server_key), timeout)
        try:
            world = RemoteWorld.ask(connection)
        except BaseException:
            connection.close()
            raise
        self._begin(RemoteSession(connection, options, horizon, _wanted(options)), world)

    def _begin(self, session: RemoteSession, world: RemoteWorld) -> None:
        self.session = session
        self.remote = world
        self.options = session.options
        self.max_chunks = session.max_chunks
        self.action_space = copy.deepcopy(world.action_space)
        self.observation_space = world.observation_space(self.options)
        self.render_mode = self.options.render_mode
        self.fps = world.fps
        self.metadata = {**type(self).metadata, "render_fps": max(1, round(world.fps))}
        self._window = Window(world.name, world.fps) if self.render_mode == "human" else None
        self._unrendered: list[np.ndarray] = []

    @classmethod
    def attach(
        cls,
        url: str,
        session: bytes,
        *,
        key: str | Path | None = None,
        server_key: str | Path | None = None,
        timeout: float = 30.0,
    ) -> RemoteEnv:
        """Go on with a session that another connection of the same key began, e.g. one given by `detach`.

        Raises:
            ServingError: as the class; ``no_session`` or ``expired``: it is not there.
        """
        env = cls.__new__(cls)
        connection = Connection(url, client_keys(key, server_key), timeout)
        try:
            world = RemoteWorld.ask(connection)
            said = connection.ask("attach", session=session).result["options"]
            chosen = {k: said[k] for k in EnvOptions.__dataclass_fields__ if said.get(k) is not None}
            remote = RemoteSession(connection, EnvOptions(**chosen), said.get("max_chunks"))
            remote.adopt(session, 0, None)
            remote.resume()
        except BaseException:
            connection.close()
            raise
        env._begin(remote, world)
        return env

    # ---- what there is to see -----------------------------------------------------------------------------------
    @property
    def last_chunk(self) -> RemoteChunk:
        """The current chunk with maps, latents and noise (B = 1); asks the server. Raises ResetNeeded."""
        return self.session.chunk()

    @property
    def new_frames(self) -> np.ndarray:
        """(n, height, width, 3) uint8, read-only: what the last reset or step brought; F in chunk mode, else 1."""
        turn = self.session.current()
        if self.options.step_mode == "frame":
            return turn.observation[None]
        if self.options.observation == "pixels":
            return turn.observation
        return turn.arrays["frames"] if "frames" in turn.arrays else self.session.chunk().frames[0]

    # ---- Gymnasium ----------------------------------------------------------------------------------------------
    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """As `WorldModelEnv.reset`, but for the option ``episode``; where the session was lost, a new one begins.

        Raises:
            InputError: an unknown option, or one that does not fit the world. ServingError: see the class.
        """
        seed = check_seed(seed)
        turn = reset_all([self.session], [seed], options)[0]
        super().reset(seed=seed)
        self._unrendered.clear()
        self._enter(turn)
        return turn.observation.copy(), dict(turn.info)

    def step(self, action: Any) -> Step:
        """As `WorldModelEnv.step`.

        Raises:
            InputError: an action of the wrong shape, type or range; nothing has changed then. ResetNeeded.
            ServingError: see the class; after one of this side (`Unanswered`), call `resume` or `reset`.
        """
        turn = self._settle(self.session.start_step(action))
        self._enter(turn)
        return turn.outcome()

    def render(self) -> Any:
        """See ``render_mode``; None without one."""
        if self.render_mode == "rgb_array":
            return self.new_frames[-1].copy()
        if self.render_mode == "rgb_array_list":
            frames, self._unrendered = self._unrendered, []
            return frames
        return None

    def close(self) -> None:
        """Close window, session and, with the last environment that uses it, the connection."""
        if self._window is not None:
            self._window.close()
        self.session.close()
        self.session.connection.release()

    def detach(self) -> bytes | None:
        """Leave the session on the server, for `attach` within its lease; returns its name."""
        name = self.session.id
        self.session.leave()
        self.session.connection.release()
        return name

    def resume(self) -> Step:
        """Where the session stands, after an error that left open whether a step was taken; as `step` returns.

        Raises:
            ResetNeeded: there is no session any more. ServingError: see the class.
        """
        turn = self.session.resume()
        self._enter(turn)
        return turn.outcome()

    def get_keys_to_action(self) -> dict[tuple[int, ...], Any]:
        """Keys for `gymnasium.utils.play`, as `WorldModelEnv.get_keys_to_action`."""
        return keys_to_action(self.action_space)

    @property
    def noop_action(self) -> Any:
        """What to do when no key is pressed."""
        return noop_action(self.action_space)

    # ---- the past and other futures -------------------------------------------------------------------------------
    def snapshot(self) -> RemoteSnapshot:
        """This moment, to return to; kept by the server. Raises ResetNeeded, ServingError."""
        return self.session.snapshot()

    def restore(self, snapshot: RemoteSnapshot) -> None:
        """Return to a snapshot exactly, random stream included.

        Raises:
            InputError: not a snapshot of a server, or of another step mode. ServingError: it is gone.
        """
        self._settle(self.session.start_restore(snapshot))
        self._unrendered.clear()

    def fork(self, n: int) -> list[RemoteEnv]:
        """``n`` environments that share this past and this connection. The first continues as this one would, the
        others with other noise.

        Raises:
            InputError: n < 1. ServingError: ``too_large`` or ``busy``: more than the server allows. ResetNeeded.
        """
        children = []
        for session in self.session.fork(n):
            if self.render_mode == "human":  # one window shows one environment
                session.options = replace(session.options, render_mode=None)
            child = type(self).__new__(type(self))
            child._begin(session, self.remote)
            children.append(child)
        return children

    # ---- real frames and plans ------------------------------------------------------------------------------------
    def observe(self, frames: np.ndarray, action: Any = None) -> Step:
        """As `WorldModelEnv.observe`; raises as `step`."""
        turn = self._settle(self.session.start_observe(frames, action))
        self._enter(turn)
        return turn.outcome()

    def score(self, frames: np.ndarray, action: Any = None, draws: int = 1) -> RemoteScore:
        """As `WorldModelEnv.score`."""
        return self.session.score(frames, action, draws)

    def imagine(self, actions: Any) -> list[RemoteChunk]:
        """As `WorldModelEnv.imagine`; ServingError ``too_large``: ask for fewer chunks at a time."""
        return self.session.imagine(actions)

    # ---- parts ----------------------------------------------------------------------------------------------------
    def _settle(self, call: Any) -> RemoteTurn:
        self.session.connection.settle([call])
        return self.session.accept(call)

    def _enter(self, turn: RemoteTurn) -> None:
        if self.render_mode == "rgb_array_list":
            self._unrendered += list(self.new_frames.copy())
        if self._window is not None:
            self._window.show(self.new_frames)


def _wanted(options: EnvOptions) -> tuple[str, ...]:
    """What every turn brings beside the observation: pixels to draw, where latents are observed."""
    return ("frames",) if options.observation == "latent" and options.render_mode is not None else ()
