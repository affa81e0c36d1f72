"""From a real environment to a world that steps and is evaluated: the whole way at a small size."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents.evaluation.sections import evaluate_agents
from tests.toy import FRAME, toy_world
from worldmodel import cli
from worldmodel.checkpoint import read_world
from worldmodel.codec.conv import ConvCodecConfig
from worldmodel.errors import CheckpointError, ConfigError, DataError
from worldmodel.files import config_from_dict, load_tensors, write_json
from worldmodel.flow.flow import FlowConfig
from worldmodel.packed import narrow
from worldmodel.training import provenance
from worldmodel.training.codec import CodecTraining, load_latents
from worldmodel.training.collect import CollectConfig, PolicyShare, collect
from worldmodel.training.episodes import Episode, EpisodeDataset, episode_path, load_episode, save_episode
from worldmodel.training.evaluate import (
    evaluate,
    fitting_horizon,
    held_out_clips,
    own_folder,
    summary,
)
from worldmodel.training.export import train_world
from worldmodel.training.flow import FlowStage, FlowTraining, Latents
from worldmodel.training.heads import HeadsTraining
from worldmodel.training.loop import LoopConfig
from worldmodel.training.measure import EvaluateConfig, interval, psnr, r_squared, ssim, wrong_actions
from worldmodel.training.probes import pendulum_angle, pendulum_perturbed, pendulum_true_angle, wrap
from worldmodel.training.provenance import trained_on
from worldmodel.training.recipes import Recipe, Round
from worldmodel.world import WorldModel

FLOW = FlowConfig(
    in_channels=4,
    patch_size=1,
    channels=32,
    top_channels=32,
    layers_per_block=(1, 1),
    head_dim=32,
    position_scale=2.0,
    action_features=8,
    noise_std=0.2,
    window=6,
    context=3,
    denoiser_layers=1,
    denoiser_window=1,
    denoiser_look_ahead=1,
)


def small_recipe(steps: int = 3) -> Recipe:
    loop = LoopConfig(steps=steps, warmup=1, lr=1e-3)
    flow = FlowTraining(FLOW, loop, batch=4, length=5, threads=1, compiled=False)
    moving = replace(flow, loop=replace(loop, optimizer="muon", seed=1), motion=0.5)
    blocks = (0, 0, 0)
    model = ConvCodecConfig(32, 32, 4, 4, 4, (8, 8, 16), blocks, blocks)
    codec = CodecTraining(model, loop, batch=8, threads=1)
    collected = CollectConfig(
        env="Pendulum-v1",
        env_kwargs={},
        episodes=20,
        chunks=8,
        frame_size=(32, 32),
        policies=(PolicyShare("random_held"),),
        hide=("last_u",),
        workers=1,
    )
    return Recipe(
        name="small",
        collect=collected,
        codec=codec,
        flow=flow,
        further=(
            Round(moving),
            Round(moving, replace(codec, smoothness=0.1, motion=0.5)),
            Round(moving, collect=replace(collected, episodes=10, policies=(PolicyShare("random"),), seed=1)),
        ),
        heads=HeadsTraining(loop, width=16, batch=16),
        starts=3,
        start_chunks=2,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    root, recipe = tmp_path_factory.mktemp("small"), small_recipe()
    for folder, config in recipe.collections(root / "data").items():
        collect(config, folder)
    assert train_world(recipe, root / "data", root / "run", root / "world", until="codec") is None
    world = train_world(recipe, root / "data", root / "run", root / "world")
    assert isinstance(world, WorldModel)
    return recipe, root


def test_trained_world_steps_with_finite_likelihood(made: tuple[Recipe, Path]) -> None:
    world = WorldModel.load(made[1] / "world")
    state, chunks = world.reset([0, 1])
    state, chunk = world.step(state, np.zeros((2, 1), dtype=np.float32))
    assert len(chunks) == 2 and chunk.frames.shape == (2, 4, 32, 32, 3)
    assert torch.isfinite(chunk.log_prob).all() and torch.isfinite(chunk.reward).all()


def test_world_json_holds_the_recipe(made: tuple[Recipe, Path]) -> None:
    spec = read_world(made[1] / "world").spec
    assert config_from_dict(Recipe, spec.provenance["recipe"], "world.json") == made[0]
    assert spec.environment["env"] == "Pendulum-v1"


def test_the_card_names_no_command_that_only_worlds_that_ship_have(made: tuple[Recipe, Path]) -> None:
    card = (made[1] / "world" / "README.md").read_text()
    assert 'load("DIR")' in card and "worldmodel evaluate DIR" in card
    assert made[0].name not in card.removeprefix("# small")


def test_further_rounds_begin_with_the_weights_before_them(made: tuple[Recipe, Path]) -> None:
    """A few steps away from them, and not from fresh ones; the world holds what came of the last."""
    run = made[1] / "run"
    flow, codec = "flow.deep.transformer.layers.0.mlp.up.weight", "encoder.1.weight"
    rounds = [
        load_tensors(run / d / "flow" / "checkpoint.safetensors")[f"average.{flow}"]
        for d in ("", "further1", "further2", "further3")
    ]
    for before, after in pairwise(rounds):
        assert 0 < (after - before).abs().max() < 0.01
    kept = load_tensors(made[1] / "world" / "flow.safetensors")[flow]
    assert torch.equal(kept, narrow(rounds[-1]).to(kept.dtype))
    coarse, fine = (
        load_tensors(run / d / "codec" / "codec.safetensors")[codec].float() for d in ("", "further2")
    )
    assert 0 < (fine - coarse).abs().max() < 0.01 and not (run / "further1" / "codec").exists()
    kept = load_tensors(made[1] / "world" / "codec.safetensors")[codec]
    assert torch.equal(kept, fine.to(kept.dtype))


def test_a_round_that_collects_is_trained_on_all_and_evaluated_like_the_newest(
    made: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, root = made
    spec = read_world(root / "world").spec
    assert spec.provenance["training_episodes"] == 17 + 8  # of 20 and of 10
    assert spec.environment["policies"] == [{"name": "random", "share": 1.0}]
    encoded = root / "run" / "further2" / "codec"
    assert [len(load_latents(encoded / f"latents{n}.safetensors")) for n in ("", 1)] == [20, 10]
    assert not (root / "run" / "codec" / "latents1.safetensors").exists()
    world = WorldModel.load(root / "world")
    for folder, held_out in ((root / "data", 2), (root / "data" / "further3", 1)):
        assert len(held_out_clips(EpisodeDataset.open(folder), world, 6, 99).frames) == held_out
    shutil.copytree(root / "data", tmp_path / "data", ignore=shutil.ignore_patterns("further*"))
    with pytest.raises(DataError, match="further3"):
        train_world(recipe, tmp_path / "data", tmp_path / "run", tmp_path / "world")


@pytest.mark.parametrize("recipe", ["pendulum", {"further": 3}, {"further": ["one"]}, {"collect": "all"}])
def test_a_recipe_that_is_none_is_named(made: tuple[Recipe, Path], tmp_path: Path, recipe: object) -> None:
    shutil.copytree(made[1] / "world", tmp_path / "world")
    file = tmp_path / "world" / "world.json"
    content = json.loads(file.read_text())
    content["provenance"]["recipe"] = recipe
    del content["provenance"]["trained_on"]
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="provenance.recipe"):
        held_out_clips(EpisodeDataset.open(made[1] / "data"), WorldModel.load(tmp_path / "world"), 6, 1)


def test_where_an_evaluation_goes(tmp_path: Path) -> None:
    """Where another world's is, beside it; a broken file is nobody's."""
    usual, note = tmp_path / "cart", tmp_path / "cart" / "evaluation.json"
    assert own_folder(usual, note.name, "abcdefghij") == usual and not usual.exists()
    write_json(note, {"fingerprint": "abcdefghij"})
    assert own_folder(usual, note.name, "abcdefghij") == usual
    assert own_folder(usual, note.name, "0123456789") == tmp_path / "cart-01234567"
    note.write_text("{")
    assert own_folder(usual, note.name, "0123456789") == usual


def test_a_round_of_another_shape_is_refused() -> None:
    recipe = small_recipe()
    wider = replace(recipe.codec, model=replace(recipe.codec.model, widths=(8, 8, 24)))
    with pytest.raises(ConfigError, match="further round 1: codec.model"):
        replace(recipe, further=(Round(recipe.flow, wider),))
    with pytest.raises(ConfigError, match="further round 2: flow.model or harmonics"):
        replace(recipe, further=(Round(recipe.flow), Round(replace(recipe.flow, harmonics=5))))
    with pytest.raises(ConfigError, match="further round 1: collect.frame_size"):
        replace(
            recipe, further=(Round(recipe.flow, collect=replace(recipe.collect, frame_size=(8, 8), seed=1)),)
        )
    with pytest.raises(ConfigError, match="further round 1: collect.seed 0 is taken"):
        replace(recipe, further=(Round(recipe.flow, collect=recipe.collect),))


def test_windows_in_which_more_moves_are_drawn_more_often() -> None:
    latents = torch.zeros(80, 4, 2, 2)
    latents[50:60] = torch.arange(10.0)[:, None, None, None]  # a part of the second episode moves
    data = Latents(
        latents, torch.zeros(80, 1), torch.zeros(80), torch.zeros(80, dtype=torch.bool), np.full(2, 40)
    )
    config = FlowTraining(FLOW, batch=40, length=5, threads=1, compiled=False, motion=0.5)
    drawn = np.concatenate([FlowStage(config, data)._places(np.random.default_rng(s)) for s in range(20)])
    moving = (drawn > 45) & (drawn < 60)
    assert set(drawn) <= set(data.places(5)) and len(drawn) == 800
    assert 0.5 < moving.mean() < 0.8  # half of them, and 14 of 72 of the other half
    with pytest.raises(ConfigError, match="motion is 2"):
        replace(config, motion=2.0)


def test_finished_stages_are_not_trained_again(made: tuple[Recipe, Path]) -> None:
    recipe, root = made
    before = {f: f.stat().st_mtime_ns for f in (root / "run").rglob("*.safetensors")}
    train_world(recipe, root / "data", root / "run", root / "again")
    assert {f: f.stat().st_mtime_ns for f in (root / "run").rglob("*.safetensors")} == before
    for name in ("flow", "codec", "heads"):
        again, first = ((root / d / f"{name}.safetensors").read_bytes() for d in ("again", "world"))
        assert again == first


def test_a_run_of_another_recipe_or_other_data_is_refused(made: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, root = made
    wider = replace(recipe, codec=replace(recipe.codec, noise=0.5), heads=replace(recipe.heads, width=8))
    told = "codec: settings.noise; heads: settings.width differ.; restore that, or use another --run"
    with pytest.raises(ConfigError, match=told):
        train_world(wider, root / "data", root / "run", tmp_path / "world")
    shutil.copytree(root / "data", tmp_path / "data")
    collect(replace(recipe.collect, episodes=21), tmp_path / "data")
    with pytest.raises(ConfigError, match="codec: data; codec/latents.safetensors: data; flow: data;"):
        train_world(recipe, tmp_path / "data", root / "run", tmp_path / "world")
    faster = replace(recipe, starts=4, flow=replace(recipe.flow, threads=2))
    assert train_world(faster, root / "data", root / "run", tmp_path / "world") is not None


def test_places_that_cannot_be_written_are_told_before_any_training(
    made: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, root = made
    (tmp_path / "file").touch()
    for run, out in (("run", "file/world"), ("file/run", "world")):
        with pytest.raises(CheckpointError, match="cannot write"):
            train_world(recipe, root / "data", tmp_path / run, tmp_path / out)
    assert not list(tmp_path.rglob("codec"))


def test_a_folder_that_holds_anything_else_is_refused_before_any_training(
    made: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, root = made
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    for out, told in (
        (tmp_path / "mine", r"holds other files .README.md.; choose another --out"),
        (root / "data", "holds other files .dataset.json, episodes, further3."),
        (root / "world", "holds another world; choose another --out"),
        (tmp_path, "is where the run lies"),
    ):
        with pytest.raises(ConfigError, match=told):
            train_world(recipe, root / "data", tmp_path / "run", out)
    assert not (tmp_path / "run").exists() and (tmp_path / "mine" / "README.md").read_text() == "mine"


def test_a_run_writes_again_over_its_own_world_and_over_the_half_of_it(
    made: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, root = made

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("worldmodel.checkpoint.write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            train_world(recipe, root / "data", root / "run", tmp_path / "out")
    assert (tmp_path / "out" / "flow.safetensors").is_file()
    for starts in (3, 2):
        again = replace(recipe, starts=starts)
        train_world(again, root / "data", root / "run", tmp_path / "out")
        assert len(read_world(tmp_path / "out").starts["frames"]) == starts


def test_windows_longer_than_every_episode_are_refused_before_the_codec_trains(
    made: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, root = made
    model = replace(FLOW, window=10)
    long = replace(recipe, flow=replace(recipe.flow, model=model, length=9), further=())
    with pytest.raises(DataError, match="no episode to train on has the 9 chunks of flow.length"):
        train_world(long, root / "data", tmp_path / "run", tmp_path / "world")
    assert not (tmp_path / "run").exists()


def test_rewards_that_are_not_finite_are_refused_before_the_codec_trains(
    made: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, root = made
    shutil.copytree(root / "data", tmp_path / "data")
    path = episode_path(tmp_path / "data", 19)
    episode = load_episode(path, 4)
    save_episode(path, episode._replace(rewards=np.full_like(episode.rewards, np.nan)))
    with pytest.raises(DataError, match="000019.npz: chunk 0 has the reward nan"):
        train_world(recipe, tmp_path / "data", tmp_path / "run", tmp_path / "world")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["env", "env_kwargs", "frame_skip"])
def test_episodes_of_another_environment_than_the_recipes_are_refused(
    made: tuple[Recipe, Path], tmp_path: Path, name: str
) -> None:
    recipe, root = made
    shutil.copytree(root / "data", tmp_path / "data")
    file = tmp_path / "data" / "further3" / "dataset.json"
    info = json.loads(file.read_text())
    info["collect"][name] = {"env": "CartPole-v1", "env_kwargs": {"g": 9.0}, "frame_skip": 2}[name]
    file.write_text(json.dumps(info))
    with pytest.raises(ConfigError, match=f"further3 was collected with {name} .*, the recipe's is "):
        train_world(recipe, tmp_path / "data", tmp_path / "run", tmp_path / "world")
    del info["collect"][name]  # not told
    file.write_text(json.dumps(info))
    assert train_world(recipe, tmp_path / "data", tmp_path / "run", tmp_path / "world", "codec") is None


def test_too_few_episodes_are_told_before_any_training(tmp_path: Path) -> None:
    recipe = replace(small_recipe(), further=())
    collect(replace(recipe.collect, episodes=1), tmp_path / "data")
    with pytest.raises(
        DataError, match="has 1 episode, too few for a test split; collect --episodes 2 or more"
    ):
        train_world(recipe, tmp_path / "data", tmp_path / "run", tmp_path / "world")
    assert not (tmp_path / "run").exists()
    collect(replace(recipe.collect, episodes=2), tmp_path / "data")
    assert train_world(recipe, tmp_path / "data", tmp_path / "run", tmp_path / "world") is not None


def test_evaluation_is_complete_and_on_held_out_episodes(made: tuple[Recipe, Path]) -> None:
    _, root = made
    config = EvaluateConfig(context=2, horizon=4, long_horizon=10, bootstrap=50)
    numbers = evaluate(
        WorldModel.load(root / "world"), EpisodeDataset.open(root / "data"), root / "report", config
    )
    assert numbers["data"]["held_out_clips"] == 2  # the last tenth of 20: never seen in training
    assert json.loads((root / "report" / "evaluation.json").read_text())["git_revision"]
    for way in ("open_loop", "teacher_forced", "codec_only", "repeat_last_chunk"):
        assert len(numbers["pictures"][way]["psnr"]) == 4
    for png in ("evaluation.png", "pictures.png"):
        assert (root / "report" / png).read_bytes().startswith(b"\x89PNG")
    assert "nats a chunk" in summary(numbers)


def test_an_evaluation_of_another_world_is_not_written_over(
    made: tuple[Recipe, Path], tmp_path: Path
) -> None:
    world, data = WorldModel.load(made[1] / "world"), EpisodeDataset.open(made[1] / "data")
    for context, told in (
        (2, "give --horizon 6 or collect"),
        (8, "8; give --context 7 --horizon 1 or collect"),
    ):
        config = EvaluateConfig(context=context, horizon=40)
        with pytest.raises(DataError, match=f"has {context + 40} chunks, the longest has .*{told}"):
            evaluate(world, data, tmp_path / "out", config)
    for config, fits in ((EvaluateConfig(), 5), (EvaluateConfig(horizon=4), 4), (EvaluateConfig(9), 1)):
        assert fitting_horizon(data, world, config) == fits
    assert not (tmp_path / "out").exists()
    for name, run in (
        ("evaluation", lambda: evaluate(world, data, tmp_path)),
        ("agents", lambda: evaluate_agents(world, tmp_path)),
    ):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({"world": "small", "fingerprint": "0"}))
        with pytest.raises(ConfigError, match=f"{name}.json is of another world .*; choose another --out"):
            run()


def test_episodes_that_were_trained_on_are_never_evaluated(made: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, root = made
    world = WorldModel.load(root / "world")
    longer = replace(recipe.collect, episodes=22)
    collect(longer, tmp_path / "longer")  # the same seed: its first 20 episodes are those of the training
    clips = held_out_clips(EpisodeDataset.open(tmp_path / "longer"), world, 6, 99)
    assert len(clips.frames) == 4  # the last tenth of the 20, and the two new ones


def test_what_was_trained_on_is_told_by_the_datasets_and_not_by_the_recipe(
    made: tuple[Recipe, Path], tmp_path: Path
) -> None:
    """As after ``collect --seed``: the recipe's seeds are not those of the episodes."""
    recipe, root = made
    for number, (folder, config) in enumerate(recipe.collections(tmp_path / "data").items()):
        collect(replace(config, seed=7 + number), folder)
    world = train_world(recipe, tmp_path / "data", tmp_path / "run", tmp_path / "world")
    assert world is not None
    told = world.spec.provenance["trained_on"]
    assert [(d["env"], d["seed"], d["episodes"]) for d in told] == [
        ("Pendulum-v1", 7, 20),
        ("Pendulum-v1", 8, 10),
    ]
    first = EpisodeDataset.open(tmp_path / "data")
    assert len(held_out_clips(first, world, 6, 99).frames) == 2
    assert len(held_out_clips(EpisodeDataset.open(root / "data"), world, 6, 99).frames) == 20
    collect(replace(recipe.collect, seed=7, episodes=3), tmp_path / "few")
    with pytest.raises(DataError, match="was trained on 3 episodes of it, so none is held out"):
        held_out_clips(EpisodeDataset.open(tmp_path / "few"), world, 6, 99)


def test_worlds_that_do_not_tell_what_they_were_trained_on_are_known_by_their_recipe() -> None:
    spec = read_world("pendulum").spec
    assert "trained_on" not in spec.provenance
    assert {(d["env"], d["seed"], d["episodes"]) for d in trained_on(spec)} == {
        ("Pendulum-v1", 0, 900),
        ("Pendulum-v1", 1, 900),
    }


def test_a_repository_around_the_package_is_not_taken_for_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "-m", "theirs")
    (tmp_path / "worldmodel").mkdir()
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path.resolve() / "worldmodel")
    assert provenance.git_revision() == "unknown"
    (tmp_path / "setup.cfg").write_text("[metadata]\nname = worldmodel\n")
    assert provenance.git_revision() != "unknown"


def test_evaluation_refuses_actions_of_another_space(made: tuple[Recipe, Path], tmp_path: Path) -> None:
    shutil.copytree(made[1] / "data", tmp_path / "data")
    file = tmp_path / "data" / "dataset.json"
    info = json.loads(file.read_text())
    file.write_text(json.dumps(info | {"action_space": {"kind": "Discrete", "n": 2, "start": 0}}))
    with pytest.raises(DataError, match=r"actions are Discrete\(2\), the world takes Box"):
        evaluate(WorldModel.load(made[1] / "world"), EpisodeDataset.open(tmp_path / "data"), tmp_path / "out")


def test_evaluation_refuses_a_dataset_of_another_size(made: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, root = made
    collect(replace(recipe.collect, frame_size=(16, 16), episodes=2), tmp_path / "data")
    with pytest.raises(DataError, match=r"16.*32"):
        evaluate(WorldModel.load(root / "world"), EpisodeDataset.open(tmp_path / "data"), tmp_path / "out")


def test_flow_training_lowers_the_loss_and_depends_on_the_action() -> None:
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (40, 6, 1)).astype(np.float32)
    latents = np.cumsum(actions, axis=1)[..., None, None] * np.ones((1, 1, 4, 2, 2), dtype=np.float32)
    data = Latents(
        torch.from_numpy(latents.reshape(-1, 4, 2, 2)),
        torch.from_numpy(actions.reshape(-1, 1)),
        torch.zeros(240),
        torch.zeros(240, dtype=torch.bool),
        np.full(40, 6),
    )
    stage = FlowStage(FlowTraining(FLOW, batch=16, length=6, bf16=False, threads=1, compiled=False), data)
    optimizer = torch.optim.AdamW(stage.module.parameters(), 3e-3)
    losses = []
    for step in range(60):
        optimizer.zero_grad()
        metrics = stage.backward(np.random.default_rng(step), torch.Generator().manual_seed(step), 0.0)
        optimizer.step()
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.3
    assert stage.flow.deep.transformer.proj_action.weight.abs().max() > 0
    assert float(metrics["score"]) < 1.0  # the denoiser explains part of the noise


def test_denoiser_target_is_the_score_of_the_flow() -> None:
    """For a flow that is the identity, p(x~) = N(0, 1): the target must be sigma^2 / 0.3 * x~."""
    data = Latents(
        torch.randn(30, 4, 2, 2, generator=torch.Generator().manual_seed(0)),
        torch.zeros(30, 1),
        torch.zeros(30),
        torch.zeros(30, dtype=torch.bool),
        np.full(5, 6),
    )
    stage = FlowStage(FlowTraining(FLOW, batch=3, length=5, bf16=False, threads=1, compiled=False), data)
    seen: dict[str, torch.Tensor] = {}
    score = stage.score

    def spy(noisy: torch.Tensor, *rest: object) -> torch.Tensor:
        seen["noisy"] = noisy
        seen["score"] = score(noisy, *rest)
        return seen["score"]

    stage.score = spy
    metrics = stage.backward(np.random.default_rng(0), torch.Generator().manual_seed(0), 0.0)
    target = seen["noisy"] * FLOW.noise_std**2 / 0.3
    expected = (seen["score"] - target).square().mean() * (0.3 / FLOW.noise_std) ** 2
    assert float(metrics["score"]) == pytest.approx(float(expected), rel=1e-4)


def test_compiled_training_step_is_the_eager_one() -> None:
    rng = np.random.default_rng(0)
    data = Latents(
        torch.from_numpy(rng.normal(size=(30, 4, 2, 2)).astype(np.float32)),
        torch.from_numpy(rng.uniform(-1, 1, (30, 1)).astype(np.float32)),
        torch.zeros(30),
        torch.zeros(30, dtype=torch.bool),
        np.full(5, 6),
    )
    metrics, gradients = [], []
    for compiled in (False, True):
        config = FlowTraining(FLOW, batch=3, length=5, bf16=False, threads=1, compiled=compiled)
        stage = FlowStage(config, data)
        metrics.append(stage.backward(np.random.default_rng(0), torch.Generator().manual_seed(0), 0.0))
        gradients.append({n: p.grad for n, p in stage.module.named_parameters() if p.grad is not None})
    assert float(metrics[0]["loss"]) == pytest.approx(float(metrics[1]["loss"]), rel=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5)


def test_noise_falls_from_its_start_to_the_models_own() -> None:
    config = FlowTraining(replace(FLOW, noise_std=0.05), length=5, noise_start=0.1)
    assert [config.noise(p) for p in (0.0, 0.4, 0.6, 1.0)] == pytest.approx([0.1, 0.1, 0.05, 0.05])
    assert config.noise(0.5) == pytest.approx((0.1 * 0.05) ** 0.5)
    assert FlowTraining(FLOW, length=5).noise(0.0) == FLOW.noise_std


def test_pendulum_probe_reads_the_simulator_to_a_third_of_a_degree(tmp_path: Path) -> None:
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    config = CollectConfig(
        env="Pendulum-v1", episodes=1, chunks=8, hide=("last_u",), workers=1, wide_starts=1.0
    )
    collect(config, tmp_path)
    episode = EpisodeDataset.open(tmp_path).episode(0)
    error = np.degrees(wrap(pendulum_angle(episode.frames) - pendulum_true_angle(episode.observations)))
    assert np.abs(error).max() < 0.35
    assert np.isnan(pendulum_angle(np.full((64, 64, 3), 255, dtype=np.uint8)))


def test_perturbed_simulator_is_the_simulator_where_nothing_is_unstable(tmp_path: Path) -> None:
    config = CollectConfig(env="Pendulum-v1", episodes=1, chunks=4, hide=("last_u",), workers=1)
    collect(config, tmp_path)
    episode = EpisodeDataset.open(tmp_path).episode(0)
    seen = episode.observations[1:].reshape(4, 4, 3)[:, -1]
    angles = pendulum_perturbed(seen[:1], episode.actions[None, 1:], 4)
    error = np.degrees(np.abs(wrap(angles[0] - pendulum_true_angle(seen[1:]))))
    assert 0.0 < error[0] < 3.0


def test_picture_metrics_and_intervals() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (2, 3, 4, 16, 16, 3), dtype=np.uint8)
    shifted = np.clip(a.astype(int) + 10, 0, 255).astype(np.uint8)
    mse = np.square(a.astype(float) - shifted).mean((2, 3, 4, 5))
    np.testing.assert_allclose(psnr(a, shifted), 10 * np.log10(255**2 / mse), rtol=1e-5)
    np.testing.assert_allclose(ssim(a, a), 1.0)
    assert (ssim(a, rng.integers(0, 256, a.shape, dtype=np.uint8)) < 0.2).all()
    config = EvaluateConfig(bootstrap=400)
    found = interval(rng.normal(5.0, 1.0, 400), np.mean, config)
    assert found["low"] < 5.0 < found["high"] and found["high"] - found["low"] == pytest.approx(
        0.196, abs=0.04
    )
    true = rng.normal(size=(20, 5))
    assert r_squared(true, true, config)["r2"] == 1.0
    assert r_squared(np.full_like(true, true.mean()), true, config)["r2"] == pytest.approx(0.0)
    once = np.zeros((2, 5))
    once[0, 0] = 1.0  # half of the resamples have no reward that varies
    assert -1.0 < r_squared(np.full_like(once, 0.1), once, config)["low"] <= 0.0  # type: ignore[operator]


@pytest.mark.parametrize(
    "space",
    [spaces.Discrete(2), spaces.Discrete(4, start=1), spaces.MultiDiscrete([2, 3], start=[0, 5])],
    ids=str,
)
def test_a_wrong_choice_is_never_the_true_one(space: spaces.Space[Any]) -> None:
    space.seed(0)
    true = np.array([[space.sample() for _ in range(20)]])
    wrong = wrong_actions(space, true)
    assert (wrong != true).all() and all(space.contains(action) for action in wrong[0])


def test_a_reward_that_never_varies_has_no_r2(made: tuple[Recipe, Path], tmp_path: Path) -> None:
    shutil.copytree(made[1] / "data", tmp_path / "data")
    for path in (tmp_path / "data" / "episodes").iterdir():
        episode = load_episode(path, 4)
        save_episode(path, episode._replace(rewards=np.full_like(episode.rewards, 0.1)))
    config = EvaluateConfig(context=2, horizon=4, long_horizon=0, bootstrap=20)
    world, data = WorldModel.load(made[1] / "world"), EpisodeDataset.open(tmp_path / "data")
    numbers = evaluate(world, data, tmp_path / "out", config)
    for reward in (numbers["likelihood"]["reward"], numbers["pictures"]["open_loop"]["reward"]):
        assert reward["r2"] is reward["low"] is reward["high"] is None
    assert "teacher-forced n/a: the reward never varies, open loop n/a" in summary(numbers)


def test_pictures_without_a_pendulum_have_no_angle(
    made: tuple[Recipe, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the JSON that is printed as in the file: null, for NaN is no JSON."""
    step = WorldModel.step

    def blank(*arguments: object) -> object:
        state, chunk = step(*arguments)  # type: ignore[arg-type]
        return state, replace(chunk, frames=torch.full_like(chunk.frames, 255))

    monkeypatch.setattr(WorldModel, "step", blank)
    world, data = str(made[1] / "world"), str(made[1] / "data")
    given = ["--data", data, "--out", str(tmp_path), "--horizon", "2", "--long-horizon", "3", "--json"]
    monkeypatch.setattr("sys.argv", ["worldmodel", "evaluate", world, *given])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code

    def refused(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    numbers = json.loads(capsys.readouterr().out, parse_constant=refused)
    assert numbers == json.loads((tmp_path / "evaluation.json").read_text())
    assert numbers["pictures"]["open_loop"]["angle_error_degrees"][0]["value"] is None
    assert numbers["endurance"]["frames_without_a_reading"] == 2 * 3 * 4  # clips, chunks, frames


def test_actions_of_a_dict_are_evaluated(tmp_path: Path) -> None:
    force = spaces.Box(-1, 3, (2,), np.float32)
    world = toy_world(tmp_path / "toy", spaces.Dict({"gear": spaces.Discrete(3), "force": force}))
    rng = np.random.default_rng(0)
    for index in range(3):
        gear, push = rng.integers(3, size=4), rng.uniform(-1, 3, (4, 2)).astype(np.float32)
        no = np.zeros(4, dtype=bool)
        frames = rng.integers(256, size=(17, *FRAME, 3), dtype=np.uint8)
        told = np.zeros((17, 0), dtype=np.float32)
        actions = {"gear": gear, "force": push}
        save_episode(
            episode_path(tmp_path, index),
            Episode(frames, actions, push[:, 0], no, no, told, {"policy": "any"}),
        )
    info = {
        "format_version": 1,
        "episodes": 3,
        "frame_skip": 4,
        "frame_size": list(FRAME),
        "fps": 10.0,
        "complete": True,
    }
    write_json(tmp_path / "dataset.json", info | {"action_space": world.spec.action_space_json})
    config = EvaluateConfig(context=1, horizon=2, long_horizon=0, bootstrap=20)
    numbers = evaluate(world, EpisodeDataset.open(tmp_path), tmp_path / "out", config)
    nats = {
        name: numbers["likelihood"][name]["nats_per_chunk"]["value"] for name in ("true", "wrong", "none")
    }
    assert len(set(nats.values())) == 3 and np.isfinite(list(nats.values())).all()
    wrong = wrong_actions(world.spec.action_space, actions)
    assert np.array_equal(wrong["gear"], (gear + 1) % 3) and np.allclose(wrong["force"], 2 - push)
