"""What tests of the engine share: small requests, and who was called how often."""

from typing import Any

import pytest

import zquant
from zquant.models.dit import DiT

SMALL: dict[str, Any] = {"width": 32, "height": 48, "steps": 2, "seed": 5, "keep_latents": True}


def request(prompt: str = "a red fox", **fields: Any) -> zquant.RunRequest:
    return zquant.RunRequest(prompt=prompt, **(SMALL | fields))


def paint(engine: zquant.Engine, prompt: str = "a red fox", **fields: Any) -> zquant.RunResult:
    return engine.generate(request(prompt, **fields))


def phases_of(engine: zquant.Engine, **fields: Any) -> list[str]:
    seen: list[str] = []
    engine.generate(request(**fields), lambda phase, *_: seen.append(phase))
    return list(dict.fromkeys(seen))


def count_calls(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, int]:
    calls = dict.fromkeys(names, 0)
    for name in names:
        real = getattr(DiT, name)

        def counted(*args: Any, name: str = name, real: Any = real) -> Any:
            calls[name] += 1
            return real(*args)

        monkeypatch.setattr(DiT, name, counted)
    return calls
