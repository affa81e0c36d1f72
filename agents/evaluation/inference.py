"""Action inference, counterfactuals and the termination head, judged by what the simulator really does.

Axis letters: B clips, T chunks, F pixel frames of a chunk.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from gymnasium import spaces

from agents.action_inference import ActionPosterior, fit_temperature, infer_action
from agents.actions import batch_of_one
from agents.counterfactual import counterfactual
from agents.evaluation.planning import episode_chunks
from agents.evaluation.trial import (
    Numbers,
    Progress,
    TrialConfig,
    auroc,
    camera,
    mean_of,
    real_env,
    replay,
    resampled,
    walk,
)
from worldmodel import Chunk, WorldModel, WorldState
from worldmodel.training.probes import PROBES, wrap

CHUNKS = (3, 12)
"""Real chunks of a clip, from and to; the last one is asked about."""
DRAWS = 1
"""Noise draws of an inference: one is the exact posterior given the latent as the world saw it."""
LEVEL = 0.9
CALIBRATION_SEED = 500_000
"""What is added to the seeds of clips on which the posterior's temperature is fitted."""
FRESH = 4
"""Fresh samples of a chunk whose errors are averaged."""


def clip_length(seed: int) -> int:
    """Chunks of the clip of a seed."""
    return int(np.random.default_rng((seed, 1)).integers(CHUNKS[0], CHUNKS[1] + 1))


def clip_seeds(config: TrialConfig) -> range:
    """One for each held-out clip."""
    return range(config.seed, config.seed + config.clips)


def evaluate_inference(world: WorldModel, config: TrialConfig, progress: Progress) -> Numbers:
    """The action of a held-out chunk read off its pixels. Box: mean absolute error of the posterior mean. Discrete:
    how often the most probable action is the true one. Coverage of the 90 % credible sets: of the posterior as it is, and
    at the temperature at which those of as many other clips cover 90 %.
    """
    env, made = real_env(world), camera(world)
    box = isinstance(env.action_space, spaces.Box)

    def inferred(seed: int) -> tuple[ActionPosterior, Any]:
        walked = walk(env, made, seed, clip_length(seed))
        return infer_action(world, walked.before_last(world), walked.frames[-1], DRAWS), walked.actions[-1]

    others = [seed + CALIBRATION_SEED for seed in clip_seeds(config)]

    def tempered(seed: int) -> list[bool]:
        posterior, true = inferred(seed)
        return posterior.contains_tempered(true, LEVEL)

    inside = progress.each("calibration", others, tempered, unit="clip")
    temperature = fit_temperature(inside, LEVEL)

    def one(seed: int) -> Numbers:
        posterior, true = inferred(seed)
        guess = posterior.mean if box else posterior.map
        return {
            "true": np.asarray(true).tolist(),
            "guess": np.asarray(guess).tolist(),
            "covered": posterior.contains(true, LEVEL),
            "covered_calibrated": posterior.tempered(temperature).contains(true, LEVEL),
        }

    parts = progress.each("action inference", clip_seeds(config), one, unit="clip")
    env.close()
    true, guess = (np.array([p[k] for p in parts], dtype=np.float64) for k in ("true", "guess"))
    numbers: Numbers = {
        "draws": DRAWS,
        "level": LEVEL,
        "coverage": mean_of([p["covered"] for p in parts], config),
        "temperature": temperature,
        "coverage_calibrated": mean_of([p["covered_calibrated"] for p in parts], config),
        "true": true.tolist(),
        "guess": guess.tolist(),
    }
    if box:
        error = np.abs(true - guess).reshape(len(parts), -1).mean(1)
        numbers["mean_absolute_error"] = mean_of(error, config)
        numbers["range"] = [float(env.action_space.low.min()), float(env.action_space.high.max())]  # type: ignore[attr-defined]
    else:
        same = (true == guess).reshape(len(parts), -1).all(1)
        numbers["accuracy"] = mean_of(same, config)
    return numbers


def evaluate_counterfactuals(world: WorldModel, config: TrialConfig, progress: Progress) -> Numbers:
    """One chunk, had another action been taken, with the simulator as judge: same state, the other action.

    Errors of the last frame: of the counterfactual; of fresh samples under the other action (the world's own sampler,
    and at temperature 1); and the world's own one-step error, of fresh samples under the action that happened. In
    degrees of the probe where the environment has one, else the root mean square over pixels.
    """
    env, made = real_env(world), camera(world)
    probe = PROBES.get(made.env)

    def error(frames: np.ndarray, real: np.ndarray, observation: np.ndarray) -> float:
        """Mean over frames (B, F, ...) of the last frame's error."""
        if probe is None:
            off = frames[:, -1].astype(np.float64) - real[-1]
            return float(np.sqrt(np.square(off).mean((1, 2, 3))).mean())
        off_picture, truth = probe
        return float(np.degrees(np.abs(wrap(off_picture(frames[:, -1]) - truth(observation)))).mean())

    own = world.spec.sampling
    wide = replace(own, temperature=1.0)

    def fresh(state: WorldState, action: Any, sampling: Any) -> np.ndarray:
        batch = np.repeat(batch_of_one(action), FRESH, axis=0)
        chunk: Chunk = world.step(state.fork(FRESH), batch, sampling)[1]
        return chunk.frames.cpu().numpy()

    def one(seed: int) -> Numbers:
        walked = walk(env, made, seed, clip_length(seed))
        state, happened = walked.before_last(world), np.asarray(walked.actions[-1])
        other = other_action(env.action_space, happened, seed)
        real, observation = replay(env, walked, other)
        clip, first = walked.frames[-1:][None], walked.frames[-1]
        made_up = counterfactual(world, state, clip, happened[None, None], other[None, None])
        return {
            "counterfactual": error(made_up.otherwise[0], real, observation),
            "fresh": error(fresh(state, other, own), real, observation),
            "fresh_at_temperature_1": error(fresh(state, other, wide), real, observation),
            "one_step": error(fresh(state, happened, own), first, walked.observations[-1]),
            "one_step_at_temperature_1": error(fresh(state, happened, wide), first, walked.observations[-1]),
        }

    parts = progress.each("counterfactuals", clip_seeds(config), one, unit="clip")
    env.close()
    errors = {name: np.array([p[name] for p in parts], dtype=np.float64) for name in parts[0]}

    def ratio(name: str) -> dict[str, float | int]:
        top, base = errors["counterfactual"], errors[name]
        return resampled(lambda rows: float(top[rows].mean() / base[rows].mean()), len(top), config)

    return {
        "unit": "pixels" if probe is None else "degrees",
        **{name: mean_of(values, config) for name, values in errors.items()},
        **{f"ratio_to_{name}": ratio(name) for name in ("one_step", "fresh", "fresh_at_temperature_1")},
        "errors": {name: values.tolist() for name, values in errors.items()},
    }


def other_action(space: spaces.Space[Any], happened: np.ndarray, seed: int) -> np.ndarray:
    """A random action that differs from the one that happened."""
    space.seed(seed)
    while True:
        other = np.asarray(space.sample())
        if not np.array_equal(other, happened):
            return other


def evaluate_termination(world: WorldModel, config: TrialConfig, progress: Progress) -> Numbers:
    """AUROC over the chunks of held-out episodes of the predicted probability that the chunk ends the episode.

    "auroc": of imagined chunks, before the real one is seen; "auroc_observed": of the real ones.
    """
    env, made = real_env(world), camera(world)
    chunks = episode_chunks(env, config)

    def one(seed: int) -> Numbers:
        walked = walk(env, made, seed, chunks)
        state = walked.begun(world)
        imagined, observed = [], []
        for frames, action in zip(walked.frames, walked.actions, strict=True):
            taken = batch_of_one(action)
            imagined.append(float(world.step(state, taken)[1].termination))
            state, chunk = world.observe(state, frames[None], taken)
            observed.append(float(chunk.termination))
        return {"imagined": imagined, "observed": observed, "terminated": walked.terminated}

    parts = progress.each("termination", config.seeds, one)
    env.close()
    flags = [np.arange(len(p["imagined"])) == len(p["imagined"]) - 1 for p in parts]
    flags = [flag & p["terminated"] for flag, p in zip(flags, parts, strict=True)]
    numbers: Numbers = {"episodes": len(parts), "terminated": sum(p["terminated"] for p in parts)}
    for name, key in (("auroc", "imagined"), ("auroc_observed", "observed")):
        scores = [np.array(p[key], dtype=np.float64) for p in parts]
        numbers[name] = resampled(
            lambda rows, scores=scores: auroc(  # type: ignore[misc]
                np.concatenate([scores[r] for r in rows]), np.concatenate([flags[r] for r in rows])
            ),
            len(parts),
            config,
        )
    return numbers


def plot_inference(axes: Any, numbers: Numbers) -> None:
    """Inferred against true actions."""
    axes.scatter(np.ravel(numbers["true"]), np.ravel(numbers["guess"]), s=10, alpha=0.6)
    title = f"action inference, {numbers['level']:.0%} sets cover {numbers['coverage']['value']:.2f}"
    axes.set(title=title, xlabel="true action", ylabel="inferred")


def plot_counterfactuals(axes: Any, numbers: Numbers) -> None:
    """Errors by way of predicting."""
    names = list(numbers["errors"])
    axes.boxplot([numbers["errors"][n] for n in names], showfliers=False, orientation="horizontal")
    axes.set_yticks(range(1, len(names) + 1), [n.replace("_", " ") for n in names])
    axes.set(title="one chunk ahead, against the simulator", xlabel=f"error, {numbers['unit']}")


def plot_termination(axes: Any, numbers: Numbers) -> None:
    """AUROC, imagined and observed; nothing where no episode terminated."""
    for place, name in enumerate(("auroc", "auroc_observed")):
        mean = numbers[name]
        axes.plot([place, place], [mean["low"], mean["high"]], color="k")
        axes.plot(place, mean["value"], "o")
    axes.set_xticks([0, 1], ["imagined", "observed"])
    axes.set(title=f"termination, {numbers['terminated']} of {numbers['episodes']} episodes", ylabel="AUROC")
