"""What may be asked for; every refusal says the value, what was expected, and what to do."""

from typing import Any

import numpy as np
import pytest
import torch

from zquant.request import RunRequest, parse_size

WRONG = {
    "empty prompt": ({"prompt": ""}, "the prompt is empty; describe the picture"),
    "blank prompt": ({"prompt": " \n"}, "the prompt is empty; describe the picture"),
    "prompt is a list": ({"prompt": ["a"]}, r"prompt is \['a'\]; it must be text"),
    "surrogate": ({"prompt": "a\ud800"}, r"prompt holds a lone surrogate \('\\ud800'\) at charac"),
    "negative is a number": ({"negative_prompt": 3}, "negative_prompt is 3; it must be text"),
    "width 1000": (
        {"width": 1000},
        "width is 1000; it must be a multiple of 16 from 16 to 8192. Nearest: 992 or 1008",
    ),
    "width 0": ({"width": 0}, "width is 0; .* Nearest: 16$"),
    "height 8200": ({"height": 8200}, "height is 8200; .* Nearest: 8192$"),
    "negative height": ({"height": -64}, "height is -64; .* Nearest: 16$"),
    "width is text": ({"width": "abc"}, "width is 'abc'; it must be a whole number"),
    "width is a float": ({"width": 1024.0}, "width is 1024.0; it must be a whole number"),
    "width is a flag": ({"width": True}, "width is True; it must be a whole number"),
    "no steps": ({"steps": 0}, "steps is 0; it must be from 1 to 1000"),
    "steps without end": ({"steps": 10**9}, "steps is 1000000000; it must be from 1 to 1000"),
    "no pictures": ({"count": 0}, "count is 0; it must be from 1 to 1000"),
    "pictures without end": ({"count": 1001}, "count is 1001; it must be from 1 to 1000"),
    "negative seed": ({"seed": -1}, r"seed is -1; it must be from 0 to 2\*\*63 - 1"),
    "seed of 64 bits": ({"seed": 2**63}, r"seed is 9223372036854775808; it must be from 0"),
    "last seed too high": (
        {"seed": 2**63 - 1, "count": 2},
        r"from 0 to 2\*\*63 - 2, so that 2 pic",
    ),
    "seed is a float": ({"seed": 1.5}, "seed is 1.5; it must be a whole number"),
    "guidance NaN": ({"guidance_scale": float("nan")}, "guidance_scale is nan; it must be a fin"),
    "guidance infinite": ({"guidance_scale": float("inf")}, "guidance_scale is inf; it must be a"),
    "guidance negative": ({"guidance_scale": -1.0}, "guidance_scale is -1.0; it must be 0 or mor"),
    "guidance is a flag": ({"guidance_scale": True}, "guidance_scale is True; it must be a finit"),
    "guidance past float": ({"guidance_scale": 10**400}, "guidance_scale is 1000.*; it must be a "),
    "normalization None": ({"cfg_normalization": None}, "cfg_normalization is None; it must be a"),
    "truncation is text": ({"cfg_truncation": "1"}, "cfg_truncation is '1'; it must be a finite"),
    "shift 0": ({"shift": 0}, "shift is 0; it must be a positive number"),
    "shift is a dict": ({"shift": {}}, "shift is {}; it must be a finite number"),
    "latents of numpy": (
        {"initial_latents": np.zeros((1, 16, 8, 8), np.float32)},
        "initial_latents is a ndarray; it must be a float torch.Tensor",
    ),
}


@pytest.mark.parametrize(("fields", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_painted_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunRequest(**{"prompt": "a fox", **fields})


def test_a_long_value_does_not_fill_the_message() -> None:
    with pytest.raises(ValueError, match="width is") as caught:
        RunRequest(prompt="a", width="x" * 10_000)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 150


RIGHT: dict[str, dict[str, Any]] = {
    "smallest": {"width": 16, "height": 16},
    "largest": {"width": 8192, "height": 8192},
    "most steps": {"steps": 1000},
    "highest seed": {"seed": 2**63 - 1},
    "normalization as a flag": {"cfg_normalization": True},
    "whole numbers as scales": {"guidance_scale": 4, "cfg_truncation": 1, "shift": 6},
    "latents": {"initial_latents": torch.zeros(1, 16, 128, 128)},
}


@pytest.mark.parametrize("fields", RIGHT.values(), ids=RIGHT)
def test_what_can_be_painted_is_accepted(fields: dict[str, Any]) -> None:
    request = RunRequest(prompt="a fox", **fields)
    assert all(getattr(request, name) is value for name, value in fields.items())


@pytest.mark.parametrize(
    ("text", "size"), [("512", (512, 512)), ("1280x720", (1280, 720)), ("16x32", (16, 32))]
)
def test_a_size_is_one_edge_or_two(text: str, size: tuple[int, int]) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "512x", "1x2x3", "-16", "5e2", "99999999", "٥١٢"])
def test_what_is_no_size_is_said(text: str) -> None:
    with pytest.raises(ValueError, match="is not pixels; write it like 512 or 1280x720"):
        parse_size(text)


def test_requests_with_latents_are_compared_by_what_they_say() -> None:
    latents = {"initial_latents": torch.zeros(1, 16, 128, 128)}
    assert RunRequest(prompt="a", **latents) == RunRequest(prompt="a", **latents)
    copied = {"initial_latents": latents["initial_latents"].clone()}
    assert RunRequest(prompt="a", **latents) == RunRequest(prompt="a", **copied)
    assert RunRequest(prompt="a", **latents) != RunRequest(prompt="b", **latents)
