"""Prompts that are kept: those of the current request survive, however many there are."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import zquant
from zquant.formats.embed_cache import EmbedCache
from zquant.models.checkpoint import Checkpoint
from zquant.prompts import KEPT, Prompts


@pytest.fixture
def prompts(toy_engine: zquant.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prompts:
    """With a cache on disk, and the tokenizer of the session's engine."""
    tokenizer = toy_engine.prompts.tokenizer
    monkeypatch.setattr(Checkpoint, "tokenizer", lambda _: tokenizer)
    cache = EmbedCache(tmp_path / "cache", max_bytes=2**20)
    return Prompts(toy_engine.checkpoint, toy_engine.device, cache)


def embeds_of(prompts: Prompts, *wanted: str) -> list[Tensor]:
    return [torch.ones(len(cut.ids), 32) for cut in prompts.ids(wanted).values()]


def test_a_prompt_that_is_used_again_is_not_the_oldest(prompts: Prompts) -> None:
    prompts.ids("ABCDEFGH")  # as by planning
    wanted = prompts.ids("ABCDI")
    assert list(prompts._ids) == list("FGHABCDI")
    prompts.learn(list(wanted), embeds_of(prompts, *wanted))
    assert list(prompts.known("ABCDI")) == list("ABCDI")
    assert len(prompts._ids) == KEPT


def test_prompts_beyond_those_that_are_kept_are_learned(prompts: Prompts) -> None:
    many = [f"fox {i}" for i in range(2 * KEPT)]
    embeds = embeds_of(prompts, *many)
    prompts.ids("ABCDEFGH")  # planned meanwhile
    prompts.learn(many, embeds)
    assert list(prompts.known(many)) == many


def test_the_cache_tells_its_trouble_once(prompts: Prompts, tmp_path: Path) -> None:
    assert prompts.known("a") == {}
    assert prompts.trouble() == ""
    (tmp_path / "cache").touch()  # where a folder should be
    for _ in range(2):
        prompts.learn("a", embeds_of(prompts, "a"))
    said = prompts.trouble()
    assert "cache: cannot be written" in said
    assert said.startswith("embeddings of prompts on disk: ")
    assert prompts.trouble() == ""
