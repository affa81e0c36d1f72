"""``worldmodel evaluate`` and ``worldmodel monitor``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from worldmodel.cli_arguments import Device, World, load


class WorldFirst(TyperGroup):
    """``evaluate WORLD`` is ``evaluate world WORLD``: what names no subcommand is the world's."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See the class."""
        known = args and (args[0] in self.commands or args[0] in ctx.help_option_names)
        return super().parse_args(ctx, args if known else ["world", *args])


evaluate_app = typer.Typer(
    cls=WorldFirst,
    help="Measure a world on held-out real episodes (`evaluate WORLD`), or what agents do with it in the real "
    "environment (`evaluate agents WORLD`).",
    add_completion=False,
    rich_markup_mode=None,
)


@evaluate_app.command("agents")
def evaluate_agents(
    world: World = "pendulum",
    out: Annotated[
        Path | None,
        typer.Option(help="Where JSON and plots go; default evaluation/NAME-agents, or beside it."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Sections, with commas between or given several times: planning, fidelity, inference, "
            "counterfactuals, termination, imagination, anomalies. Default: all that fit the world."
        ),
    ] = None,
    starts: Annotated[int, typer.Option(help="Held-out starts of an episode.")] = 20,
    clips: Annotated[int, typer.Option(help="Held-out clips for inference and counterfactuals.")] = 100,
    chunks: Annotated[
        int | None,
        typer.Option(help="At most so many chunks of an episode; default: the environment's limit."),
    ] = None,
    preset: Annotated[str, typer.Option(help="Of the planner: fast, quality or paper.")] = "fast",
    policy_chunks: Annotated[int, typer.Option(help="Imagined chunks that PPO learns from.")] = 60_000,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON instead of the summary.")] = False,
) -> None:
    """Agents proven in the real environment: planning, inference, counterfactuals, learning in imagination, anomalies.

    Every section is kept in OUT/sections with its finished parts: kill it at any moment and run the same command again.
    Under half an hour on one CPU core.
    """
    from agents.evaluation.sections import evaluate_agents as run
    from agents.evaluation.sections import summary
    from agents.evaluation.trial import TrialConfig
    from worldmodel.training.evaluate import own_folder

    model = load(world, device)
    config = TrialConfig(starts, chunks, preset, clips, policy_chunks)
    usual = Path("evaluation") / f"{model.spec.name}-agents"
    folder = out or own_folder(usual, "agents.json", model.fingerprint)
    sections = [name for text in only or () if text for name in text.split(",")]
    numbers = run(model, folder, config, sections)
    print(json.dumps(numbers, indent=2) if as_json else summary(numbers))
    print(f"written to {folder}", file=sys.stderr)


@evaluate_app.command("world")
def evaluate(
    world: World = "pendulum",
    data: Annotated[
        Path | None,
        typer.Option(help="Real episodes; default: fresh ones are collected, with a seed of their own."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where JSON and plots go; default evaluation/NAME, or where another world's are there, "
            "evaluation/NAME-FINGERPRINT."
        ),
    ] = None,
    clips: Annotated[int, typer.Option(help="Held-out clips, one an episode.")] = 90,
    context: Annotated[int, typer.Option(help="Real chunks that are seen first.")] = 3,
    horizon: Annotated[
        int | None,
        typer.Option(help="Chunks imagined and judged; default 16, or fewer where episodes are shorter."),
    ] = None,
    long_horizon: Annotated[int, typer.Option(help="Chunks of the endurance test, 0 for none.")] = 100,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON instead of the summary.")] = False,
) -> None:
    """Measure a world on held-out real episodes: nats, bits/dim, PSNR, SSIM, angle error, reward; JSON and plots."""
    from dataclasses import replace

    from worldmodel.files import finite
    from worldmodel.training.episodes import EpisodeDataset
    from worldmodel.training.evaluate import (
        check_report,
        fitting_horizon,
        held_out_dataset,
        own_folder,
        summary,
    )
    from worldmodel.training.evaluate import evaluate as run
    from worldmodel.training.measure import EvaluateConfig

    imagined = EvaluateConfig.horizon if horizon is None else horizon
    config = EvaluateConfig(context, imagined, long_horizon, clips)
    model = load(world, device)
    usual = Path("evaluation") / model.spec.name
    folder = out or own_folder(usual, "evaluation.json", model.fingerprint)
    if data is None:
        check_report(folder / "evaluation.json", model)  # before episodes are collected
    dataset = EpisodeDataset.open(data) if data else held_out_dataset(model, clips)
    if horizon is None:
        config = replace(config, horizon=fitting_horizon(dataset, model, config))
    numbers = run(model, dataset, folder, config)
    print(json.dumps(finite(numbers), indent=2) if as_json else summary(numbers))
    print(f"written to {folder}", file=sys.stderr)


def monitor(
    source: Annotated[
        Path, typer.Argument(help="A directory of episodes, a video file, or a directory of videos.")
    ],
    world: Annotated[str, typer.Option(help="The world that knows what is normal.")] = "pendulum",
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="At least 100 normal episodes or videos, or a saved monitor (.safetensors); default: 200 fresh "
            "episodes of the world's own environment. Calibrates once: the monitor is kept in the cache folder."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to; default monitor/SOURCE.")] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Share of normal episodes that may raise an alarm; default 0.05, or a saved monitor's own."
        ),
    ] = None,
    videos: Annotated[int, typer.Option(help="Overlay videos, of the strangest episodes.")] = 4,
    device: Device = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the JSON instead of a line an episode.")
    ] = False,
) -> None:
    """Judge real episodes by a world's likelihood: alarms, scores, heat maps; JSON, CSV, a plot and overlay videos.

    A video holds no actions, so it is judged given its past alone; compression is strange to a monitor that was
    calibrated on lossless episodes, so calibrate on normal videos of the same camera.
    """
    from agents.anomaly.recordings import default_out, monitor_source

    folder = out or default_out(source)
    numbers = monitor_source(load(world, device), source, calibration, folder, alpha, videos)
    if as_json:
        print(json.dumps(numbers, indent=2))
    else:
        for row in numbers["results"]:
            alarm = f"ALARM at chunk {row['first_alarm_chunk']}" if row["alarm"] else "normal"
            print(
                f"{row['name']}  {alarm}, highest score {row['highest_score']:.1f} ({row['strangest_channel']})"
            )
        print(f"{numbers['episodes_with_alarm']} of {numbers['episodes']} episodes raised an alarm")
    print(f"written to {folder}", file=sys.stderr)


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.add_typer(evaluate_app, name="evaluate")
    app.command()(monitor)
