"""Prompts to condition tokens: STARFlow-V's templates, and a T5 encoder through transformers whose outputs are kept.

A *caption* is what a user writes, with a task prefix where training used one; the *text* is the caption in the
template of the training data, which is what the encoder reads. Axis letters: L condition tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from worldmodel.condition.text import TextConfig
from worldmodel.errors import CheckpointError, ConfigError, InputError
from worldmodel.files import load_tensors, save_tensors

Task = Literal["extend", "last", "v2v"]
PREFIXES: dict[Task, str] = {"extend": "(extend) ", "last": "(last) ", "v2v": "(v2v) "}
"""What training put before the caption: continuing without the first frame, towards a last frame, and where a source
clip comes first and then the target."""

ASPECTS = ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", "21:9", "9:21")
REMEMBERED = 512
"""Prompts kept in memory; the least recently used one goes first."""


def template(
    caption: str, *, fps: float | None = None, noise_std: float | None = None, aspect: str | None = None
) -> str:
    """The text of a caption, as trained; a line is left out where its argument is None.

    fps: frames a second, 0 for a picture. noise_std: the flow's noise level. aspect: as "16:9".
    """
    text = caption
    if fps is not None:
        text = f"A video with {fps:g} fps:\n{text}\n" if fps else f"An image:\n{text}\n"
    if noise_std is not None:
        text = f"Noise Level {int(1000 * noise_std)}:\n{text}"
    return text if aspect is None else f"{text}\n in a {aspect} aspect ratio.\n"


def for_task(caption: str, task: Task) -> str:
    """A caption with the prefix of a task; one that has a prefix already, or is empty, stays as it is."""
    if not caption or caption.startswith(tuple(PREFIXES.values())):
        return caption
    return PREFIXES[task] + caption


def _ratio(aspect: str) -> float:
    if aspect not in ASPECTS:
        raise InputError(f"aspect is {aspect!r:.40}, expected one of {', '.join(ASPECTS)}")
    width, height = aspect.split(":")
    return int(width) / int(height)


def aspect_of(frame_size: tuple[int, int]) -> str:
    """The name of the aspect ratio nearest to frames of (height, width) pixels."""
    wanted = math.log(frame_size[1] / frame_size[0])
    return min(ASPECTS, key=lambda name: abs(math.log(_ratio(name)) - wanted))


def frame_size_for(aspect: str, like: tuple[int, int], stride: int) -> tuple[int, int]:
    """(height, width) pixels of an aspect ratio: the area of ``like``, sides rounded to multiples of ``stride``.

    Raises:
        InputError: an unknown aspect ratio; the known ones are listed.
    """
    ratio, area = _ratio(aspect), like[0] * like[1]
    if aspect == aspect_of(like):
        return like
    height, width = math.sqrt(area / ratio), math.sqrt(area * ratio)
    return max(1, round(height / stride)) * stride, max(1, round(width / stride)) * stride


Encode = Callable[[Sequence[str]], list[Tensor]]
"""Texts to the encoder's outputs, (n, dim) float32 each, padding left out."""


class T5:
    """A T5 encoder and its tokenizer, read when the first text comes."""

    def __init__(self, name: str, tokens: int, device: torch.device | str = "cpu") -> None:
        self.name, self.tokens, self.device = name, tokens, torch.device(device)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[Tensor]:
        """Outputs (n, dim) float32 on the CPU, n <= ``tokens``; longer texts are cut there.

        Raises:
            ConfigError: transformers is not installed. CheckpointError: the encoder cannot be read.
        """
        tokenizer, model = _read_t5(self.name, self.device)
        batch = tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.tokens, return_tensors="pt"
        )
        ids, mask = batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device)
        out = model(input_ids=ids, attention_mask=mask).last_hidden_state.float().cpu()
        return [row[: int(n)].clone() for row, n in zip(out, mask.sum(1), strict=True)]


@lru_cache(maxsize=1)
def _read_t5(name: str, device: torch.device) -> tuple[Any, Any]:
    try:
        from transformers import AutoTokenizer, T5EncoderModel
    except ImportError as error:
        raise ConfigError("prompts need transformers: pip install 'worldmodel[hub]'") from error
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model: Any = T5EncoderModel.from_pretrained(name, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"text encoder {name!r} cannot be read ({' '.join(str(error).split()):.160}); it is fetched once from the "
            "Hugging Face Hub (google/flan-t5-xl: 11.4 GB), or name its directory as text.encoder in world.json, "
            "or bring a folder of encoded prompts (--prompt-cache)"
        ) from error
    return tokenizer, model.to(device).eval().requires_grad_(False)


class Prompts:
    """Captions to the condition tokens of one world; nothing about a session.

    Every text is encoded once: outputs are kept in memory (`REMEMBERED`) and, with ``folder``, on disk.
    """

    def __init__(
        self,
        config: TextConfig,
        shape: tuple[int, int],
        fps: float,
        noise_std: float,
        frame_size: tuple[int, int],
        encode: Encode,
        folder: Path | None = None,
    ) -> None:
        """``shape``: (L, text_dim). ``frame_size``: (height, width) pixels."""
        self.config = config
        self.shape = shape
        self.fps, self.noise_std, self.frame_size = fps, noise_std, frame_size
        self.encode = encode
        self.folder = folder
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def at(self, frame_size: tuple[int, int]) -> Prompts:
        """The same for frames of another size."""
        return Prompts(
            self.config, self.shape, self.fps, self.noise_std, frame_size, self.encode, self.folder
        )

    def text(self, caption: str) -> str:
        """What the encoder reads."""
        c = self.config
        return template(
            caption,
            fps=self.fps if c.fps else None,
            noise_std=self.noise_std if c.noise_level else None,
            aspect=aspect_of(self.frame_size) if c.aspect else None,
        )

    def without_start(self, caption: str) -> str:
        """The caption of a window from which the first frame of the video has gone."""
        return for_task(caption, "extend") if self.config.extend else caption

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Condition tokens (B, L, text_dim) float32 on the CPU, zero where the text is shorter; "" is the
        unconditional one.

        Raises:
            ConfigError, CheckpointError: no encoder, see `T5`, or a damaged file in ``folder``.
        """
        texts = [self.text(caption) for caption in captions]
        known = {text: found for text in set(texts) if (found := self._find(text)) is not None}
        if missing := sorted(set(texts) - set(known)):
            for text, out in zip(missing, self.encode(missing), strict=True):
                known[text] = self._fitting(out, f"text encoder {self.config.encoder!r}")
                if self.folder is not None:
                    save_tensors(self._file(text), {"tokens": out}, {"text": text})
        for text, out in known.items():
            self._kept[text] = out
            self._kept.move_to_end(text)
        while len(self._kept) > REMEMBERED:
            self._kept.popitem(last=False)
        return torch.stack([F.pad(known[t], (0, 0, 0, self.shape[0] - len(known[t]))) for t in texts])

    def _find(self, text: str) -> Tensor | None:
        if text in self._kept:
            return self._kept[text]
        if self.folder is None or not self._file(text).is_file():
            return None
        file = self._file(text)
        return self._fitting(load_tensors(file).get("tokens", torch.empty(0)), str(file))

    def _fitting(self, out: Tensor, where: str) -> Tensor:
        length, dim = self.shape
        if out.ndim != 2 or out.shape[1] != dim or len(out) > length or not torch.isfinite(out).all():
            raise CheckpointError(
                f"{where}: {tuple(out.shape)} condition tokens, expected at most {length} finite ones of {dim} numbers"
            )
        return out.float()

    def _file(self, text: str) -> Path:
        assert self.folder is not None
        key = f"{self.config.encoder}\0{self.shape[0]}\0{text}"
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
