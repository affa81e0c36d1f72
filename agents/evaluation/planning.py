"""Planning proven in the real environment, and whether what looks best in the world is best in reality.

Axis letters: N candidate sequences, H chunks of the horizon, F simulator steps of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

from agents.actions import take
from agents.beliefs import first_belief
from agents.evaluation.trial import Numbers, Progress, TrialConfig, camera, mean_of, real_env, resampled, walk
from agents.mpc import MPCAgent
from agents.objectives import PredictedReward
from agents.planners import Planner, imagine
from agents.proposals import propose_behaviour
from agents.search import search_actions
from envs import ChunkedEnv
from worldmodel import WorldModel
from worldmodel.training.policies import lander_state

CANDIDATES = 20
"""Sequences of a start whose returns are compared; best of 5 is asked of each five."""
LONGEST_PREFIX = 20
"""Chunks of behaviour before the candidates, at most."""
CHUNKS_WITHOUT_LIMIT = 50

Act = Callable[[ChunkedEnv, np.ndarray], Any]
"""The environment and its newest chunk (F, height, width, 3) to an action."""


def play(env: ChunkedEnv, seed: int, chunks: int, act: Act) -> Numbers:
    """One real episode from a seed: its return, its chunks, and whether it terminated."""
    frames, _ = env.reset(seed=seed)
    total, done, count, terminated = 0.0, False, 0, False
    while not done and count < chunks:
        frames, reward, terminated, truncated, _ = env.step(act(env, frames))
        total, count, done = total + float(reward), count + 1, terminated or truncated
    return {"return": total, "chunks": count, "terminated": terminated}


def with_the_world(world: WorldModel, planner: Planner, env: ChunkedEnv, seed: int, chunks: int) -> Numbers:
    """An episode planned in the world from pixels; "seconds" is the median of its plans."""
    agent, seconds = MPCAgent.informed(world, planner), list[float]()

    def act(_: ChunkedEnv, frames: np.ndarray) -> Any:
        if agent.state is None:
            agent.reset(frames, seed)
            action = agent.act()
        else:
            action = agent.act(frames)
        assert agent.last_plan is not None
        seconds.append(agent.last_plan.seconds)
        return action

    return {**play(env, seed, chunks, act), "seconds": float(np.median(seconds))}


def with_the_prior(world: WorldModel, seed: int) -> Act:
    """The world's prior alone, which plans nothing: its most probable action after what was observed."""
    agent, taken = MPCAgent(world), list[Any]()

    def act(_: ChunkedEnv, frames: np.ndarray) -> Any:
        if taken:
            agent.observe(frames, taken[-1])
        else:
            agent.reset(frames, seed)
        assert agent.state is not None
        proposal = propose_behaviour(world, agent.state, 1, 1, np.random.default_rng(seed))
        taken.append(take(take(proposal, 0), 0))
        return taken[-1]

    return act


def at_random(seed: int) -> Act:
    """Uniform actions of a stream of their own."""
    streams: list[Any] = []

    def act(env: ChunkedEnv, _: np.ndarray) -> Any:
        if not streams:
            env.action_space.seed(seed)
            streams.append(env.action_space)
        return streams[0].sample()

    return act


def pendulum_returns(state: np.ndarray, actions: np.ndarray, held: int) -> np.ndarray:
    """Returns (N,) of torques (N, H, 1), each held for some steps of Pendulum-v1 from state (angle, speed)."""
    angle, speed = np.full(len(actions), state[0]), np.full(len(actions), state[1])
    total = np.zeros(len(actions))
    for torque in np.repeat(actions[..., 0].astype(np.float64), held, axis=1).T:
        wrapped = (angle + np.pi) % (2 * np.pi) - np.pi
        total -= wrapped**2 + 0.1 * speed**2 + 0.001 * torque**2
        speed = np.clip(speed + (15.0 * np.sin(angle) + 3.0 * torque) * 0.05, -8, 8)
        angle = angle + 0.05 * speed
    return total


def with_true_dynamics(planner: Planner, seed: int) -> Act:
    """The same search with Pendulum-v1's own equations and state in the world's place."""
    search, rng = planner.search, np.random.default_rng(seed)
    warm: list[Any] = []

    def act(env: ChunkedEnv, _: np.ndarray) -> Any:
        state = np.array(env.unwrapped.state)  # type: ignore[attr-defined]
        belief, tried = warm.pop() if warm else (first_belief(env.action_space, search), None)
        found = search_actions(
            lambda actions: pendulum_returns(state, actions, env.camera.frame_skip),
            belief,
            search,
            rng,
            tried,
        )
        warm.append(found.shift(search))
        return found.actions[0]

    return act


def with_the_heuristic() -> Act:
    """Gymnasium's own controller of LunarLander, asked once a chunk."""
    from gymnasium.envs.box2d.lunar_lander import heuristic

    def act(env: ChunkedEnv, _: np.ndarray) -> Any:
        lander: Any = env.unwrapped
        return heuristic(lander, lander_state(lander))

    return act


def reference_agent(env: str, planner: Planner, seed: int) -> tuple[str, Act] | None:
    """What knows the simulator from inside, by environment id: its name, and how it acts."""
    if env == "Pendulum-v1":
        return "true_dynamics", with_true_dynamics(planner, seed)
    if env == "LunarLander-v3":
        return "heuristic", with_the_heuristic()
    return None


def episode_chunks(env: ChunkedEnv, config: TrialConfig) -> int:
    """Chunks of an episode at most: as asked, else the environment's own time limit."""
    limit = None if env.spec is None else env.spec.max_episode_steps
    own = CHUNKS_WITHOUT_LIMIT if limit is None else math.ceil(limit / env.camera.frame_skip)
    return own if config.chunks is None else config.chunks


def evaluate_planning(world: WorldModel, config: TrialConfig, progress: Progress) -> Numbers:
    """Mean returns on the same held-out starts: planned in the world from pixels, with the simulator's own knowledge
    (true dynamics, or the environment's heuristic), at random, and by the world's prior without planning, if it has one.
    """
    env, planner, name = real_env(world), Planner.preset(config.preset), camera(world).env
    chunks = episode_chunks(env, config)
    numbers: Numbers = {"preset": config.preset, "frames": chunks * env.camera.frame_skip}
    ways: dict[str, Callable[[int], Numbers]] = {
        "random": lambda seed: play(env, seed, chunks, at_random(seed)),
        "world": lambda seed: with_the_world(world, planner, env, seed, chunks),
    }
    if (first := reference_agent(name, planner, config.seed)) is not None:

        def inside(seed: int) -> Numbers:
            agent = reference_agent(name, planner, seed)
            assert agent is not None
            return play(env, seed, chunks, agent[1])

        ways = {first[0]: inside, **ways}
    if world.heads is not None and world.heads.config.discount is not None:
        ways["prior"] = lambda seed: play(env, seed, chunks, with_the_prior(world, seed))
    for way, run in ways.items():
        episodes = progress.each(f"{way} plays {name}", config.seeds, run)
        returns = [e["return"] for e in episodes]
        numbers[way] = {
            "mean_return": mean_of(returns, config),
            "returns": returns,
            "terminated": sum(e["terminated"] for e in episodes),
        }
        if way == "world":
            seconds = float(np.median([e["seconds"] for e in episodes]))
            numbers[way] |= {"seconds_a_plan": seconds, "plans_a_second": 1 / seconds}
    env.close()
    if first is not None:
        floor, top, own = (numbers[w]["mean_return"]["value"] for w in ("random", first[0], "world"))
        numbers["share_of_the_lead"] = (own - floor) / (top - floor)
    return numbers


def evaluate_fidelity(world: WorldModel, config: TrialConfig, progress: Progress) -> Numbers:
    """Returns of candidate sequences of one planning horizon, imagined in the world and executed in reality.

    From every held-out start some chunks of the behaviour that the world was learned from lead to a state; reality is
    replayed from the start for each candidate, so any deterministic simulator will do. "r": Pearson's over all
    candidates; "r_within": its mean over starts, each start's own candidates; "best_of_5": how often the world's
    favourite of five is reality's.
    """
    horizon = Planner.preset(config.preset).search.horizon
    env = real_env(world)
    made = camera(world)
    plain = gymnasium.make(made.env, disable_env_checker=True, **made.env_kwargs)

    def one(seed: int) -> Numbers:
        space, rng = env.action_space, np.random.default_rng(seed)
        walked = walk(env, made, seed, int(rng.integers(2, LONGEST_PREFIX + 2)))
        state = walked.before_last(world)
        space.seed(seed)
        candidates = np.array(
            [[space.sample() for _ in range(horizon)] for _ in range(CANDIDATES)], dtype=space.dtype
        )
        imagined = imagine(world, state, candidates, PredictedReward(), decode=False)
        real = [executed(plain, seed, walked.actions[:-1], list(c), made.frame_skip) for c in candidates]
        return {"imagined": imagined.returns.tolist(), "real": real}

    parts = progress.each("decision fidelity", config.seeds, one, unit="start")
    env.close()
    plain.close()
    imagined, real = (np.array([p[k] for p in parts], dtype=np.float64) for k in ("imagined", "real"))
    fives = (len(parts), -1, 5)
    picked = imagined.reshape(fives).argmax(-1)[..., None]
    truly = np.take_along_axis(real.reshape(fives), picked, axis=-1)[..., 0]
    right = truly >= real.reshape(fives).max(-1) - 1e-9
    within = [pearson(a, b) for a, b in zip(imagined, real, strict=True)]
    return {
        "horizon": horizon,
        "candidates": CANDIDATES,
        "r": resampled(lambda rows: pearson(imagined[rows], real[rows]), len(parts), config),
        "r_within": mean_of(within, config),
        "best_of_5": mean_of(right.mean(1), config),
        "imagined": imagined.tolist(),
        "real": real.tolist(),
    }


def executed(
    env: gymnasium.Env[Any, Any], seed: int, prefix: list[Any], candidate: list[Any], held: int
) -> float:
    """The real return of a candidate's chunks after a prefix from a seed, each action held; 0 a step once it is over."""
    env.reset(seed=seed)
    total, done = 0.0, False
    for index, action in enumerate(prefix + candidate):
        for _ in range(held):
            if not done:
                _, reward, terminated, truncated, _ = env.step(action)
                done = terminated or truncated
                total += float(reward) if index >= len(prefix) else 0.0
    return total


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r over all elements; NaN where one side does not vary."""
    a, b = a.ravel() - a.mean(), b.ravel() - b.mean()
    scale = math.sqrt(float((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else math.nan


def plot_planning(axes: Any, numbers: Numbers) -> None:
    """Returns of every start by way of acting."""
    ways = [w for w in ("true_dynamics", "heuristic", "world", "prior", "random") if w in numbers]
    for place, way in enumerate(ways):
        returns, mean = numbers[way]["returns"], numbers[way]["mean_return"]
        axes.scatter(np.full(len(returns), place), returns, s=12, alpha=0.5)
        spread = [[mean["value"] - mean["low"]], [mean["high"] - mean["value"]]]
        axes.errorbar(place + 0.2, mean["value"], spread, fmt="ko", capsize=3)
    axes.set_xticks(range(len(ways)), [w.replace("_", " ") for w in ways])
    axes.set(title=f"real return, {numbers['frames']} frames, preset {numbers['preset']}", ylabel="return")


def plot_fidelity(axes: Any, numbers: Numbers) -> None:
    """Imagined against real returns."""
    for imagined, real in zip(numbers["imagined"], numbers["real"], strict=True):
        axes.scatter(real, imagined, s=8, alpha=0.6)
    both = [x for k in ("imagined", "real") for row in numbers[k] for x in row]
    axes.plot([min(both), max(both)], [min(both), max(both)], color="0.5", lw=1)
    axes.set(
        title=f"{numbers['horizon']}-chunk returns, r {numbers['r']['value']:.3f}",
        xlabel="in reality",
        ylabel="in the world",
    )


def plot_returns(axes: Any, numbers: Numbers) -> None:
    """A policy's returns, by start."""
    mean = numbers["mean_return"]["value"]
    axes.hist(numbers["returns"], bins=10)
    axes.axvline(mean, color="k")
    axes.set(title=f"learned in imagination: mean real return {mean:.0f}", xlabel="return", ylabel="starts")
