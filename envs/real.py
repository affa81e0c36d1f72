"""`ChunkedEnv`: a real environment seen as its world is seen, chunk by chunk."""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from worldmodel import InputError
from worldmodel.training import collect


class ChunkedEnv(gymnasium.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """A Gymnasium environment that renders, with the spaces of a `WorldModelEnv` of it.

    Observation: (F, height, width, 3) uint8, the F = ``frame_skip`` frames that one held action causes; at
    reset, the first picture F times. The reward is summed over the F simulator steps; if the episode ends
    inside a chunk, its last frame is repeated. ``info`` is the simulator's, with its own observation under
    "observation".

    Args:
        env: an id for `gymnasium.make`, or an environment made with render_mode "rgb_array".
        frame_size: (height, width) pixels after an area resize.
        hide: attributes of the simulator set to None while it renders; "last_u" is Pendulum's torque arrow.

    Raises:
        InputError: it cannot be made, or has another render mode.
        ConfigError: it renders no RGB picture.
    """

    def __init__(
        self,
        env: str | gymnasium.Env[Any, Any],
        frame_skip: int = 4,
        frame_size: tuple[int, int] = (64, 64),
        hide: tuple[str, ...] = (),
        **env_kwargs: Any,
    ) -> None:
        self.camera = collect.CollectConfig(
            env=env if isinstance(env, str) else "given",
            env_kwargs=env_kwargs,
            frame_skip=frame_skip,
            frame_size=(frame_size[0], frame_size[1]),
            hide=tuple(hide),
        )
        if isinstance(env, str):
            try:
                env = gymnasium.make(env, render_mode="rgb_array", **env_kwargs)
            except (gymnasium.error.Error, ImportError, TypeError) as error:
                raise InputError(f"cannot make the environment: {' '.join(str(error).split())}") from error
        if env.render_mode != "rgb_array":
            raise InputError(f'render_mode is {env.render_mode!r}; make the environment with "rgb_array"')
        RecordConstructorArgs.__init__(self, frame_skip=frame_skip, frame_size=frame_size, hide=hide)
        gymnasium.Wrapper.__init__(self, env)
        shape = (frame_skip, *frame_size, 3)
        self.observation_space = spaces.Box(0, 255, shape, np.uint8)
        self.fps = float(env.metadata.get("render_fps") or 30)
        self.new_frames = np.zeros(shape, dtype=np.uint8)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """As the environment; the first picture F times.

        Raises:
            InputError: the simulator lacks an attribute that is to be hidden.
        """
        observation, info = self.env.reset(seed=seed, options=options)
        missing = [name for name in self.camera.hide if not hasattr(self.env.unwrapped, name)]
        if missing:
            raise InputError(f"{self.env.unwrapped} has no attribute {', '.join(missing)} to hide")
        self.new_frames = np.stack([self._picture()] * self.camera.frame_skip)
        return self.new_frames.copy(), {**info, "observation": observation}

    def step(self, action: Any) -> tuple[np.ndarray, SupportsFloat, bool, bool, dict[str, Any]]:
        """Hold ``action`` for F simulator steps."""
        frames: list[np.ndarray] = []
        total, terminated, truncated = 0.0, False, False
        info: dict[str, Any] = {}
        for _ in range(self.camera.frame_skip):
            if terminated or truncated:
                frames.append(frames[-1])
                continue
            observation, reward, terminated, truncated, info = self.env.step(action)
            info = {**info, "observation": observation}
            total += float(reward)
            frames.append(self._picture())
        self.new_frames = np.stack(frames)
        return self.new_frames.copy(), total, bool(terminated), bool(truncated), info

    def _picture(self) -> np.ndarray:
        return collect.take_picture(self.env, self.camera)
