"""Learning in imagination: PPO (Stable-Baselines3) inside a world's vector environment, judged in the real one.

The policy sees the latent of the newest chunk, which holds the motion within it, and acts once a chunk; rewards are
the world's own predictions. Reality is met only in the evaluation, through the codec.

Axis letters: B slots, F pixel frames of a chunk, C latent channels; h, w latent grid.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv
from tqdm import tqdm

from agents.beliefs import first_belief
from agents.evaluation.planning import episode_chunks, play
from agents.evaluation.trial import Numbers, Progress, TrialConfig, mean_of, real_env
from agents.presets import Search
from envs import ChunkedEnv, WorldModelVectorEnv
from worldmodel import WorldModel
from worldmodel.errors import CheckpointError, InputError
from worldmodel.files import load_metadata, load_tensors, save_tensors

SLOTS = 64
HORIZON = 50
"""Chunks of an imagined episode."""
WIDTHS = [64, 64]
"""Hidden units of actor and critic."""
LARGEST = 10.0
"""Observations and rewards are clipped there, in standard deviations."""
PPO_DIALS: dict[str, Any] = {
    "n_steps": 16,
    "batch_size": 128,
    "n_epochs": 15,
    "gamma": 0.9,
    "gae_lambda": 0.9,
}
"""A chunk is several frames, so gamma 0.9 looks ten chunks ahead."""
LEARNING_RATE = 1e-3
"""At the beginning; it falls linearly to a twentieth."""


class Observer:
    """Latents (B, C, h, w) to what a policy sees: (B, C h w) float32, standardised by the world's bank of real clips."""

    def __init__(self, world: WorldModel) -> None:
        frames = world.starts["frames"]
        _, chunks = world.observe_clip(
            world.initial_state(list(range(len(frames)))), frames, world.start_actions(np.arange(len(frames)))
        )
        latents = torch.stack([c.latent for c in chunks]).flatten(0, 1).flatten(1).float().cpu()
        self.mean, spread = latents.mean(0).numpy(), latents.std(0).numpy()
        self.std = np.maximum(spread, 0.1 * spread.max())
        self.space = spaces.Box(-LARGEST, LARGEST, self.mean.shape, np.float32)

    def __call__(self, latents: np.ndarray) -> np.ndarray:
        """See the class."""
        flat = latents.reshape(len(latents), -1)
        return np.clip((flat - self.mean) / self.std, -LARGEST, LARGEST).astype(np.float32)


def policy_space(space: spaces.Space[Any]) -> spaces.Space[Any]:
    """What a policy's actions lie in: a bounded Box becomes [-1, 1]; choices are a row, counted from 0.

    Raises:
        InputError: another space.
    """
    if isinstance(space, spaces.Discrete):
        return spaces.Discrete(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return spaces.MultiDiscrete(np.asarray(space.nvec).reshape(-1))
    if isinstance(space, spaces.Box) and space.is_bounded():
        return spaces.Box(-1.0, 1.0, space.shape, np.float32)
    raise InputError(f"a policy cannot act in {space}; expected Discrete, MultiDiscrete or a bounded Box")


def to_world(space: spaces.Space[Any], actions: np.ndarray) -> np.ndarray:
    """A policy's actions (B, ...) in the world's action space, as planners make them of their own numbers."""
    belief = first_belief(space, Search(horizon=1))
    return np.asarray(belief.actions(actions.reshape(len(actions), 1, -1))[:, 0])


def from_still_pictures(world: WorldModel) -> WorldModel:
    """The same world with a bank of clips of one chunk: its real chunks, and each of their pictures held still.

    A real episode begins with one picture, held; a policy that never saw such a start does not know what to do there.
    """
    frames = world.starts["frames"]
    moving = frames.reshape(-1, 1, *frames.shape[2:])
    pictures = frames.reshape(-1, 1, 1, *frames.shape[3:])
    still = np.broadcast_to(pictures, (len(pictures), 1, *frames.shape[2:]))
    starts = {"frames": np.concatenate((moving, still))}
    for name, actions in world.starts.items():
        if name.startswith("actions"):
            flat = actions.reshape(-1, 1, *actions.shape[2:])
            held = np.repeat(flat, len(still) // len(flat), axis=0)
            starts[name] = np.concatenate((flat, held))
    parts = world.flow, world.codec, world.actions, world.heads
    return WorldModel(world.spec, *parts, starts, world.fingerprint, world.prompts)


class ImaginedVecEnv(VecEnv):
    """`WorldModelVectorEnv` as Stable-Baselines3 expects one: latents standardised, rewards divided by their scale."""

    def __init__(self, world: WorldModel, slots: int = SLOTS, horizon: int = HORIZON, seed: int = 0) -> None:
        """Raises InputError for a world without reward, without a bank of whole chunks, or with actions of other kinds."""
        if world.heads is None:
            raise InputError(f"world {world.spec.name} predicts no reward; train one with heads")
        if "frames" not in world.starts or world.starts["frames"].ndim != 6:
            raise InputError(
                f"world {world.spec.name} has no bank of whole chunks, with which a policy's episodes begin; train another"
            )
        self.batch = WorldModelVectorEnv(
            from_still_pictures(world),
            slots,
            autoreset_mode=AutoresetMode.SAME_STEP,
            observation="latent",
            max_chunks=horizon,
            temperature=world.spec.sampling.temperature,
        )
        self.observer = Observer(world)
        self.reward_scale = float(world.heads.reward_std)
        self._first_seed: int | None = seed
        self._actions: np.ndarray | None = None
        super().__init__(slots, self.observer.space, policy_space(self.batch.single_action_space))

    def reset(self) -> np.ndarray:
        """(B, C h w): new episodes in all slots."""
        latents, _ = self.batch.reset(seed=self._first_seed)
        self._first_seed = None
        return self.observer(latents)

    def step_async(self, actions: np.ndarray) -> None:
        """Take the actions of the next step."""
        self._actions = to_world(self.batch.single_action_space, actions)

    def step_wait(self) -> Any:
        """Imagine a chunk in every slot."""
        latents, rewards, terminated, truncated, extra = self.batch.step(self._actions)
        done = terminated | truncated
        infos: list[dict[str, Any]] = [{"reward": float(r)} for r in rewards]
        for row in np.flatnonzero(done):
            last = self.observer(extra["final_obs"][row][None])[0]
            infos[row] |= {
                "terminal_observation": last,
                "TimeLimit.truncated": bool(truncated[row] and not terminated[row]),
            }
        scaled = np.clip(rewards / self.reward_scale, -LARGEST, LARGEST)
        return self.observer(latents), scaled.astype(np.float32), done, infos

    def close(self) -> None:
        """Nothing is held."""
        self.batch.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The batch's attribute, for every slot asked."""
        return [getattr(self.batch, attr_name)] * len(self._rows(indices))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Refused: slots share everything."""
        raise NotImplementedError("slots of a world have no attributes of their own")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Refused: slots share everything."""
        raise NotImplementedError("slots of a world have no methods of their own")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """No slot is wrapped."""
        return [False] * len(self._rows(indices))

    def _rows(self, indices: int | Sequence[int] | None) -> list[int]:
        return list(self._get_indices(indices))


class _Watch(BaseCallback):
    """A bar, and the policy on disk between updates."""

    def __init__(self, total: int, save: Callable[[int], None], minutes: float | None) -> None:
        super().__init__()
        self.deadline = math.inf if minutes is None else time.monotonic() + 60.0 * minutes
        self.bar = tqdm(total=total, desc="PPO in imagination", unit="chunk")
        self.save_policy = save
        self.rewards: list[float] = []

    def _on_step(self) -> bool:
        self.rewards += [info["reward"] for info in self.locals["infos"]]
        return time.monotonic() < self.deadline

    def _on_rollout_end(self) -> None:
        self.bar.update(self.num_timesteps - self.bar.n)
        self.bar.set_postfix(reward_a_chunk=f"{np.mean(self.rewards):.2f}")
        self.rewards.clear()

    def _on_rollout_start(self) -> None:
        self.save_policy(self.num_timesteps)  # after the update of the rollout before

    def _on_training_end(self) -> None:
        self.save_policy(self.num_timesteps)
        self.bar.close()


def train_policy(
    world: WorldModel, chunks: int, path: Path, seed: int = 0, minutes: float | None = None
) -> ActorCriticPolicy:
    """Learn from so many imagined chunks, or for so long; the policy is kept in ``path`` (safetensors) at every update.

    A policy of this world that is there already is trained on, Adam's moments apart, until it has seen ``chunks``; in
    episodes of its own, which ``seed`` and the chunks seen before make.
    """
    done = chunks_learned(world, path)
    env = ImaginedVecEnv(world, seed=seed + done)
    left = max(0.0, 1.0 - done / chunks)
    algorithm = PPO(
        "MlpPolicy",
        env,
        learning_rate=lambda remaining: LEARNING_RATE * max(left * remaining, 0.05),
        seed=seed + done,
        device="cpu",
        policy_kwargs={"net_arch": WIDTHS},
        **PPO_DIALS,
    )
    if done:
        algorithm.policy.load_state_dict(load_tensors(path))

    def save(count: int) -> None:
        metadata = {"world": world.fingerprint, "chunks": done + count}
        save_tensors(path, algorithm.policy.state_dict(), {"policy": json.dumps(metadata)})

    if done < chunks:
        algorithm.learn(chunks - done, callback=_Watch(chunks - done, save, minutes))
    env.close()
    return algorithm.policy


def chunks_learned(world: WorldModel, path: Path) -> int:
    """Imagined chunks that the policy in a file has seen; 0 for no file, or one of another world."""
    try:
        found = json.loads(load_metadata(path).get("policy", "{}"))
    except (CheckpointError, ValueError):
        return 0
    return int(found.get("chunks", 0)) if found.get("world") == world.fingerprint else 0


class PolicyAgent:
    """A policy in reality: real chunks through the codec, its mean action out; `reset`, then `act`."""

    def __init__(self, world: WorldModel, policy: ActorCriticPolicy) -> None:
        self.world, self.policy, self.observer = world, policy, Observer(world)
        self._codec = world.codec.initial_state(1)

    def reset(self) -> None:
        """A new episode begins."""
        self._codec = self.world.codec.initial_state(1)

    @torch.no_grad()
    def act(self, frames: np.ndarray) -> Any:
        """The action after a real chunk (F, height, width, 3) uint8."""
        pixels = torch.from_numpy(frames[None]).to(self.world.device)
        latents, self._codec = self.world.codec.encode(pixels, self._codec)
        seen = self.observer(latents[:, 0].cpu().numpy())
        actions, _ = self.policy.predict(seen, deterministic=True)
        return to_world(self.world.spec.action_space, actions)[0]


def play_policy(agent: PolicyAgent, env: ChunkedEnv, seed: int, chunks: int) -> Numbers:
    """One real episode; as `agents.evaluation.planning.play`."""
    agent.reset()
    return play(env, seed, chunks, lambda _, frames: agent.act(frames))


def evaluate_imagination(world: WorldModel, config: TrialConfig, progress: Progress) -> Numbers:
    """The real returns of a policy that has learned in imagination alone, on held-out starts."""
    path = progress.path.with_name(f"policy-{config.policy_chunks}.safetensors")
    policy = train_policy(world, config.policy_chunks, path)
    env, agent = real_env(world), PolicyAgent(world, policy)
    chunks = episode_chunks(env, config)
    episodes = progress.each(
        "policy plays in reality", config.seeds, lambda seed: play_policy(agent, env, seed, chunks)
    )
    env.close()
    returns = [e["return"] for e in episodes]
    return {
        "imagined_chunks": chunks_learned(world, path),
        "frames": chunks * world.chunk_frames,
        "mean_return": mean_of(returns, config),
        "returns": returns,
    }
