"""Prompts: the templates as strings, a T5 of a few words, and encodings that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.toy import TEXT_DIM, TEXT_TOKENS, write_t5
from worldmodel.condition import prompts as module
from worldmodel.condition.prompts import T5, Prompts, aspect_of, for_task, frame_size_for, template
from worldmodel.condition.text import TextConfig
from worldmodel.errors import CheckpointError, InputError

TABLE = [
    ({}, "a corgi", "a corgi"),
    ({"fps": 16}, "a corgi", "A video with 16 fps:\na corgi\n"),
    ({"fps": 16.0}, "", "A video with 16 fps:\n\n"),
    ({"fps": 0}, "a corgi", "An image:\na corgi\n"),
    ({"noise_std": 0.5}, "a corgi", "Noise Level 500:\na corgi"),
    ({"aspect": "16:9"}, "a corgi", "a corgi\n in a 16:9 aspect ratio.\n"),
    (
        {"fps": 16, "noise_std": 0.5, "aspect": "16:9"},
        "a corgi",
        "Noise Level 500:\nA video with 16 fps:\na corgi\n\n in a 16:9 aspect ratio.\n",
    ),
    (
        {"fps": 0, "noise_std": 0.3, "aspect": "1:1"},
        "",
        "Noise Level 300:\nAn image:\n\n\n in a 1:1 aspect ratio.\n",
    ),
    (
        {"fps": 24, "noise_std": 0.5, "aspect": "9:16"},
        "(v2v) a corgi",
        "Noise Level 500:\nA video with 24 fps:\n(v2v) a corgi\n\n in a 9:16 aspect ratio.\n",
    ),
]


@pytest.mark.parametrize(("given", "caption", "text"), TABLE)
def test_templates(given: dict, caption: str, text: str) -> None:
    assert template(caption, **given) == text


def test_task_prefixes() -> None:
    assert [for_task("a corgi", task) for task in ("extend", "last", "v2v")] == [
        "(extend) a corgi",
        "(last) a corgi",
        "(v2v) a corgi",
    ]
    assert for_task("", "extend") == "" and for_task("(v2v) a corgi", "extend") == "(v2v) a corgi"


def test_aspect_ratios() -> None:
    assert [aspect_of(size) for size in ((480, 848), (848, 480), (256, 256), (480, 640))] == [
        "16:9",
        "9:16",
        "1:1",
        "4:3",
    ]
    assert frame_size_for("16:9", (480, 848), 16) == (480, 848)
    assert frame_size_for("9:16", (480, 848), 16) == (848, 480)
    assert frame_size_for("1:1", (480, 848), 16) == (640, 640)
    for aspect in module.ASPECTS:
        height, width = frame_size_for(aspect, (480, 848), 16)
        assert height % 16 == width % 16 == 0 and aspect_of((height, width)) == aspect
        assert 0.95 < height * width / (480 * 848) < 1.05
    with pytest.raises(InputError, match="expected one of 1:1"):
        frame_size_for("5:4", (480, 848), 16)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> T5:
    pytest.importorskip("transformers")
    return T5(str(write_t5(tmp_path_factory.mktemp("t5"))), TEXT_TOKENS)


class Counting:
    """An encoder that says what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, texts: Sequence[str]) -> list[Tensor]:
        self.asked += texts
        return [torch.full((3, TEXT_DIM), float(len(text))) for text in texts]


def made(encode: module.Encode, folder: Path | None = None, **config: bool) -> Prompts:
    shape = (TEXT_TOKENS, TEXT_DIM)
    return Prompts(TextConfig("t5", **config), shape, 16.0, 0.5, (480, 848), encode, folder)


def test_padding_is_zero_and_the_encoder_sees_none_of_it(t5: T5) -> None:
    from transformers import AutoTokenizer, T5EncoderModel

    prompts = made(t5)
    tokens = prompts(["a corgi looks", ""])
    assert tokens.shape == (2, TEXT_TOKENS, TEXT_DIM) and tokens.dtype == torch.float32
    tokenizer, model = AutoTokenizer.from_pretrained(t5.name), T5EncoderModel.from_pretrained(t5.name)
    for row, caption in zip(tokens, ("a corgi looks", ""), strict=True):
        ids = tokenizer(prompts.text(caption), return_tensors="pt").input_ids
        with torch.no_grad():
            alone = model(input_ids=ids).last_hidden_state[0]
        assert 0 < len(alone) < TEXT_TOKENS and not row[len(alone) :].any()
        torch.testing.assert_close(row[: len(alone)], alone, rtol=1e-5, atol=1e-5)
    assert not torch.equal(tokens[0], tokens[1])


def test_long_prompts_are_cut(t5: T5) -> None:
    assert len(t5([" ".join(["corgi"] * 100)])[0]) == TEXT_TOKENS


def test_lines_that_a_model_was_not_trained_with_are_left_out() -> None:
    assert made(Counting(), aspect=False, noise_level=False).text("x") == "A video with 16 fps:\nx\n"
    assert made(Counting()).text("x").endswith(" in a 16:9 aspect ratio.\n")
    assert made(Counting()).at((480, 480)).text("x").endswith(" in a 1:1 aspect ratio.\n")
    assert made(Counting()).without_start("x") == "(extend) x"
    assert made(Counting(), extend=False).without_start("x") == "x"


def test_each_text_is_encoded_once_and_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 2)
    encode = Counting()
    prompts = made(encode)
    first = prompts(["a", "b", "a"])
    assert len(encode.asked) == 2 and torch.equal(first[0], first[2])
    assert torch.equal(prompts(["b"])[0], first[1]) and len(encode.asked) == 2
    prompts(["c"])  # b was used last, so a goes
    prompts(["b"])
    assert len(encode.asked) == 3
    prompts(["a"])
    assert len(encode.asked) == 4


def test_a_folder_of_encoded_prompts_needs_no_encoder(tmp_path: Path) -> None:
    def nobody(texts: Sequence[str]) -> list[Tensor]:
        raise AssertionError(texts)

    first = made(Counting(), tmp_path)(["a corgi", ""])
    assert torch.equal(made(nobody, tmp_path)(["a corgi", ""]), first)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 2 and {load_file(f)["tokens"].shape for f in files} == {(3, TEXT_DIM)}
    save_file({"tokens": torch.zeros(TEXT_TOKENS + 1, TEXT_DIM)}, files[0])
    with pytest.raises(CheckpointError, match="expected at most") as error:
        made(nobody, tmp_path)(["a corgi", ""])
    assert files[0].name in str(error.value)
    files[0].write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        made(nobody, tmp_path)(["a corgi", ""])


def test_an_encoder_of_another_width_is_an_error() -> None:
    with pytest.raises(CheckpointError, match=r"\(3, 5\) condition tokens, expected at most"):
        made(lambda texts: [torch.zeros(3, 5) for _ in texts])(["a"])


def test_a_missing_encoder_says_where_it_goes(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(CheckpointError, match=r"11.4 GB.*text.encoder in world.json") as error:
        T5(str(tmp_path / "absent"), 8)(["a"])
    assert "\n" not in str(error.value)
