"""What a world's condition tokens are: which encoder reads a prompt, and which lines its template has."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TextConfig:
    """How prompts become condition tokens; their number and width are the flow's ``text_tokens`` and ``text_dim``.

    encoder: a T5 encoder's name on the Hugging Face Hub, or a directory. fps, noise_level, aspect: whether the
    template has the line of that name. extend: whether training put "(extend) " before captions of windows without the
    video's first frame.
    """

    encoder: str = "google/flan-t5-xl"
    fps: bool = True
    noise_level: bool = True
    aspect: bool = True
    extend: bool = True
