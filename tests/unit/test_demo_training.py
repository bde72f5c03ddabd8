"""The demo's world, its cut vocabulary, and that its networks train what the engine paints with."""

import argparse
import random
from pathlib import Path

import pytest
import torch
from demo_export import export
from demo_networks import CAPTION_TOKENS, Painter, cut_vocabulary, new_vae
from demo_scenes import SIZE, all_texts, caption, draw, random_scene, words
from train_demo import Muon, encode_pictures, train_painter, train_vae

from zquant import Engine, RunRequest
from zquant.models.tokenizer import Tokenizer, Vocabulary, prompt_ids


def test_a_scene_told_from_the_other_shape_is_the_same_picture_and_equally_held_out() -> None:
    rng = random.Random(0)
    for _ in range(200):
        scene = random_scene(rng, held_out=rng.random() < 0.5)
        turned = scene.turned()
        assert turned.turned() == scene
        assert turned.held_out == scene.held_out
        if scene.relation is None:
            continue
        first, second = draw(scene, random.Random(1)), draw(turned, random.Random(1))
        ours, theirs = (first.getpixel((64, 64)), second.getpixel((64, 64)))
        assert ours == theirs  # the gap between the shapes: the background


def test_a_tenth_of_the_scenes_is_held_out_and_training_never_draws_one() -> None:
    rng = random.Random(0)
    assert not any(random_scene(rng).held_out for _ in range(500))
    every = [random_scene(rng, held_out=out) for out in (False, True) for _ in range(50)]
    assert {scene.held_out for scene in every} == {False, True}


def test_captions_say_what_is_drawn_in_both_languages() -> None:
    rng, known = random.Random(0), set(words())
    seen = set()
    for _ in range(300):
        scene = random_scene(rng)
        text = caption(scene, rng)
        seen.add(text.isascii())
        if text.isascii():
            assert set(text.split()) <= known
            assert all(shape.color in text and shape.kind in text for shape in scene.shapes)
    assert seen == {True, False}


def test_pictures_follow_the_seed_and_the_size() -> None:
    scene = random_scene(random.Random(3))
    same = [draw(scene, random.Random(1)).tobytes() for _ in range(2)]
    assert same[0] == same[1]
    assert draw(scene, random.Random(2)).tobytes() != same[0]
    assert draw(scene, random.Random(1)).size == (SIZE, SIZE)
    assert draw(scene, random.Random(1), size=64).size == (64, 64)


def test_the_cut_vocabulary_splits_the_grammar_as_the_whole_one_does() -> None:
    whole, cut = Vocabulary.bundled(), cut_vocabulary()
    assert len(cut.tokens) < 1000
    ours, theirs = Tokenizer(cut), Tokenizer(whole)
    for text in dict.fromkeys(all_texts()):
        ids = prompt_ids(ours, text).ids
        assert len(ids) <= CAPTION_TOKENS
        assert [cut.tokens[i] for i in ids] == [
            whole.tokens[i] for i in prompt_ids(theirs, text).ids
        ]


def test_other_prompts_fall_back_to_bytes_and_lose_nothing() -> None:
    tokenizer = Tokenizer(cut_vocabulary())
    for text in ("a red fox in the snow", "雪地里的狐狸 🦊", "<think>\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Painter, Path]:
    """Networks with random weights, all gates open, and the official folder made of them."""
    work = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    painter = Painter(cut_vocabulary())
    with torch.no_grad():
        for p in painter.parameters():  # stored as BF16, so be BF16
            p.add_(0.02 * torch.randn_like(p)).copy_(p.bfloat16().float())
    torch.save(dict(painter.named_parameters()), work / "painter.pt")
    torch.save(new_vae().state_dict(), work / "vae.pt")
    export(work, work / "checkpoint")
    return painter, work / "checkpoint"


def test_the_engine_paints_what_the_trained_networks_paint(
    untrained: tuple[Painter, Path],
) -> None:
    painter, folder = untrained
    prompts = ["a red circle left of a blue square", "绿色圆环，灰色背景"]
    wanted = painter.paint(prompts, seed=5)
    engine = Engine.open(folder, device="cpu", compute_dtype="float32")
    for i, prompt in enumerate(prompts):
        request = RunRequest(prompt=prompt, seed=5 + i, width=128, height=128, keep_latents=True)
        latents = engine.generate(request).latents
        assert latents is not None
        error = (latents[-1] - wanted[i]).norm() / wanted[i].norm()
        assert error < 1e-5
    engine.close()


def test_training_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    options = {
        "seed": 0,
        "vae_steps": 1,
        "pictures": 32,
        "batch": 2,
        "samples": 1,
        "lr": 1e-3,
        "muon_lr": 1e-3,
    }
    whole = argparse.Namespace(work=tmp_path / "whole", steps=2, save_every=100, **options)
    killed = argparse.Namespace(work=tmp_path / "killed", steps=2, save_every=1, **options)
    for args in (whole, killed):
        args.work.mkdir()
    vae = train_vae(whole)
    scenes, latents = encode_pictures(whole, vae)
    train_painter(whole, vae, scenes, latents)

    def stop(step: int) -> None:
        if step == 1:  # after the state of one step was saved
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_painter(killed, vae, scenes, latents, stop)
    train_painter(killed, vae, scenes, latents)
    states = [torch.load(args.work / "painter.pt", weights_only=True) for args in (whole, killed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_muon_moves_every_direction_alike() -> None:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(8, 16))
    p.grad = torch.randn(8, 2) @ torch.randn(2, 16) + 0.05 * torch.randn(8, 16)
    before = torch.linalg.svdvals(p.grad)
    Muon([p], lr=1.0).step()
    after = torch.linalg.svdvals(p.detach())
    assert before[0] / before[-1] > 20
    assert after[0] / after[-1] < 2.5
