"""The page of plots and the contact sheets of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np

from worldmodel.errors import ConfigError
from worldmodel.files import write_atomic
from worldmodel.training.measure import Report, shown_r2

BAND, MARGIN = 38, 80
"""Pixels above and to the left of a contact sheet's pictures, for what they show."""
PAPER, INK = 235, (40, 40, 40)
STYLE = {
    "open_loop": ("open loop", "C3"),
    "teacher_forced": ("teacher-forced", "C0"),
    "codec_only": ("codec only", "C2"),
    "repeat_last_chunk": ("repeat last chunk", "0.5"),
    "perturbed_simulator": ("exact simulator, start slightly off", "C4"),
}


def pyplot() -> Any:
    """Matplotlib's pyplot, drawing to files only.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError('plots need matplotlib; install it with: pip install "worldmodel[demo]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _curve(axes: Any, values: list[dict[str, float]], label: str, colour: str) -> None:
    horizon = np.arange(1, len(values) + 1)
    axes.plot(horizon, [v["value"] for v in values], color=colour, label=label)
    axes.fill_between(
        horizon, [v["low"] for v in values], [v["high"] for v in values], color=colour, alpha=0.2, lw=0
    )


def plot_report(report: Report, folder: Path) -> None:
    """Write ``evaluation.png`` (a page of plots) and ``pictures.png`` (real against imagined).

    Raises:
        ConfigError: matplotlib is not installed.
    """
    plt = pyplot()
    numbers = report.numbers
    figure, axes = plt.subplots(2, 3, figsize=(15, 8.5), layout="constrained")
    ways = numbers["pictures"]
    for metric, axis, title in (
        ("psnr", axes[0, 0], "PSNR (dB)"),
        ("ssim", axes[0, 1], "SSIM"),
        ("angle_error_degrees", axes[0, 2], "median error of the angle (degrees)"),
    ):
        for name, (label, colour) in STYLE.items():
            if metric in ways.get(name, {}):
                _curve(axis, ways[name][metric], label, colour)
        axis.set(xlabel="chunks after the real context", title=title)
        axis.grid(alpha=0.3)
    if axes[0, 2].lines:
        axes[0, 2].set_yscale("log")
        axes[0, 2].legend(fontsize=8)
    else:  # no probe reads an angle from this world's pictures
        axes[0, 2].set_axis_off()
        axes[0, 2].set_title("")
    axes[0, 0].legend()
    names = {"true": "true action", "none": "no action", "wrong": "wrong action"}
    for axis, key, title in (
        (axes[1, 0], "nats_per_chunk", "log-density of the noised latent (nats a chunk)"),
        (axes[1, 1], "bits_per_dim", "bits per latent dimension"),
    ):
        values = [numbers["likelihood"][k][key] for k in names]
        centre = np.array([v["value"] for v in values])
        errors = np.abs(np.array([[v["low"], v["high"]] for v in values]).T - centre)
        axis.errorbar(range(3), centre, yerr=errors, fmt="o", capsize=6)
        axis.set_xticks(range(3), list(names.values()))
        axis.set(title=title)
        axis.grid(alpha=0.3)
    reward = numbers["likelihood"]["reward"]
    lines = [
        f"world {numbers['world']}   revision {numbers['git_revision']}",
        f"held-out clips: {numbers['data']['held_out_clips']}, context {numbers['context_chunks']} chunks",
        f"reward R2, teacher-forced: {shown_r2(reward)}"
        + ("" if reward["r2"] is None else f"  [{reward['low']:.4f}, {reward['high']:.4f}]"),
        f"reward R2, open loop: {shown_r2(ways['open_loop']['reward'])}",
        f"codec PSNR of the mean error: {ways['codec_only']['psnr_of_mean_error']:.2f} dB",
    ]
    if "endurance" in numbers:
        e = numbers["endurance"]
        lines += [
            f"open loop of {e['chunks']} chunks, PSNR to the nearest real frame:",
            f"   first tenth {e['sharpness_psnr_first_tenth']['value']:.1f} dB, "
            f"last tenth {e['sharpness_psnr_last_tenth']['value']:.1f} dB",
            f"   degrees a frame: {e['degrees_a_frame_last_tenth']['value']:.1f} "
            f"(real {e['degrees_a_frame_real']['value']:.1f})",
        ]
    axes[1, 2].axis("off")
    axes[1, 2].text(0.0, 0.95, "\n".join(lines), va="top", family="monospace", fontsize=9)
    figure.suptitle("Shaded: 95 % bootstrap intervals over held-out clips")
    write_atomic(folder / "evaluation.png", lambda file: figure.savefig(file, dpi=110, format="png"))
    plt.close(figure)
    write_sheet(folder / "pictures.png", contact_sheet(report))


def contact_sheet(report: Report, scale: int = 2) -> np.ndarray:
    """(height, width, 3) uint8: for each clip the last frame of every chunk, real above open loop; then the long run."""
    blocks = []
    for clip, (real, imagined) in enumerate(
        zip(report.pictures["real"], report.pictures["open_loop"], strict=True)
    ):
        title = f"Clip {clip + 1}: chunks after {report.numbers['context_chunks']} real ones, same actions"
        times = [f"+{t + 1}" for t in range(len(real))]
        blocks.append(_block(title, times, {"real": real[:, -1], "imagined": imagined[:, -1]}, scale))
    if "endurance" in report.pictures:
        strips = {f"run {row + 1}": strip for row, strip in enumerate(report.pictures["endurance"])}
        chunks, shown = report.numbers["endurance"]["chunks"], report.pictures["endurance"].shape[1]
        title = f"{chunks} chunks of open loop under random actions, from the first to the last: all imagined"
        blocks.append(_block(title, ["+1", *[""] * (shown - 2), f"+{chunks}"][-shown:], strips, scale))
    width = max(block.shape[1] for block in blocks)
    return np.concatenate(
        [np.pad(b, ((0, 0), (0, width - b.shape[1]), (0, 0)), constant_values=PAPER) for b in blocks]
    )


def _block(title: str, times: list[str], strips: dict[str, np.ndarray], scale: int) -> np.ndarray:
    """Strips (T, height, width, 3) uint8 one below the other, enlarged, with their names and times in the margins."""
    height, width = (scale * side for side in next(iter(strips.values())).shape[1:3])
    size = (BAND + len(strips) * height, MARGIN + len(times) * width, 3)
    block = np.full(size, PAPER, dtype=np.uint8)
    block[0] = INK
    _write(block, title, MARGIN, 15)
    for column, time in enumerate(times):
        _write(block, time, MARGIN + column * width + 2, BAND - 4)
    for row, (name, strip) in enumerate(strips.items()):
        top = BAND + row * height
        large = np.repeat(np.repeat(np.concatenate(list(strip), axis=1), scale, axis=0), scale, axis=1)
        block[top : top + height, MARGIN:] = large
        _write(block, name, 4, top + height // 2 + 5)
    return block


def _write(picture: np.ndarray, text: str, x: int, y: int) -> None:
    cv2.putText(picture, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.45, INK, 1, cv2.LINE_AA)


def write_sheet(path: Path, picture: np.ndarray) -> None:
    """Write a picture (height, width, 3) uint8 RGB as PNG, atomically."""
    _, data = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    write_atomic(path, lambda file: file.write_bytes(data.tobytes()))
