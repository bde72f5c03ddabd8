"""Write the trained demo model: the official folder layout, then the folder that is shipped.

    python tools/demo_export.py WORK CHECKPOINT     # from the states of train_demo.py
    python tools/demo_export.py WORK CHECKPOINT --ship zquant/demo

The layout, names and configs are those of the published checkpoints, so that every loader of
Z-Image takes the demo for a small Z-Image. The shipped folder is what `zquant convert --qtype Q8_0`
makes of it, plus what the engine should know: the words of the grammar and the size of a picture.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from checkpoint_layout import CONFIGS, SHAPES, scheduler_config, tokenizer_files
from demo_networks import DIT, VAE_CONFIG, Painter, cut_vocabulary, text_config
from demo_scenes import SIZE, words
from safetensors.torch import save_file
from torch import Tensor

from zquant.models.tokenizer import NORMAL

HINT = (
    'the demo model knows only coloured shapes, such as "a red circle left of a blue square on a '
    'black background"; for other pictures convert Z-Image, see the README'
)


def main() -> int:
    """Export, and ship if asked to."""
    args = _arguments()
    export(args.work, args.checkpoint)
    if args.ship:
        ship(args.checkpoint, args.ship)
    return 0


def export(work: Path, out: Path) -> None:
    """The official folder of the weights in `work`: BF16 everywhere, as published."""
    vocabulary = cut_vocabulary()
    configs = _configs(len(vocabulary.tokens))
    torch.manual_seed(0)
    painter = Painter(vocabulary)
    painter.load_state_dict(torch.load(work / "painter.pt", weights_only=True))
    tensors = {
        "transformer": painter.dit.state_dict(),
        "text_encoder": painter.text_encoder.state_dict(),
        "vae": torch.load(work / "vae.pt", weights_only=True),
    }
    for name, shape in SHAPES["text_encoder"](configs["text_encoder"]):
        if name not in tensors["text_encoder"]:  # the last layer: stored by all, used by none
            tensors["text_encoder"][name] = torch.full(shape, shape[-1] ** -0.5)
    for component, config in configs.items():
        wanted = dict(SHAPES[component](config))
        found = {name: tuple(t.shape) for name, t in tensors[component].items()}
        if found != wanted:
            raise SystemExit(f"{component}: {set(found.items()) ^ set(wanted.items())}")
        _save(out / component, component, tensors[component])
        _write(out / component / "config.json", config)
    ordinary = [
        t for t, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == NORMAL
    ]
    merges = [f"{a} {b}" for a, b in vocabulary.merges]
    (out / "tokenizer").mkdir(exist_ok=True)
    for name, content in tokenizer_files(ordinary, merges).items():
        _write(out / "tokenizer" / name, content)
    (out / "tokenizer" / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *merges, ""]), "utf-8"
    )
    _write(out / "scheduler" / "scheduler_config.json", scheduler_config("turbo"))
    _write(
        out / "model_index.json",
        {
            "_class_name": "ZImagePipeline",
            "_diffusers_version": "0.36.0.dev0",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "Qwen3Model"],
            "tokenizer": ["transformers", "Qwen2Tokenizer"],
            "transformer": ["diffusers", "ZImageTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def ship(checkpoint: Path, folder: Path) -> None:
    """Convert `checkpoint` into `folder` and complete its model.json."""
    command = [sys.executable, "-m", "zquant", "convert", str(checkpoint), str(folder)]
    subprocess.run([*command, "--qtype", "Q8_0"], check=True)
    manifest = folder / "model.json"
    content = json.loads(manifest.read_text("utf-8"))
    content["source"] = "trained by tools/train_demo.py"
    content["size"] = [SIZE, SIZE]
    content["hint"] = {"words": words(), "text": HINT}
    _write(manifest, content)


def _configs(vocab_size: int) -> dict[str, dict[str, Any]]:
    """The config.json of every component."""
    text = text_config(vocab_size)
    return {
        "transformer": CONFIGS["transformer"]
        | {
            "axes_dims": list(DIT.axes_dims),
            "cap_feat_dim": DIT.cap_feat_dim,
            "dim": DIT.dim,
            "n_heads": DIT.n_heads,
            "n_kv_heads": DIT.n_heads,
            "n_layers": DIT.n_layers,
            "n_refiner_layers": DIT.n_refiner_layers,
        },
        "text_encoder": CONFIGS["text_encoder"]
        | {
            "head_dim": text.head_dim,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "max_window_layers": text.n_layers,
            "num_attention_heads": text.n_heads,
            "num_hidden_layers": text.n_layers,
            "num_key_value_heads": text.n_kv_heads,
            "vocab_size": vocab_size,
        },
        "vae": CONFIGS["vae"]
        | {
            "_name_or_path": "zquant demo",
            "block_out_channels": list(VAE_CONFIG.block_out_channels),
            "layers_per_block": VAE_CONFIG.layers_per_block,
            "norm_num_groups": VAE_CONFIG.norm_groups,
            "sample_size": SIZE,
        },
    }


def _save(folder: Path, component: str, tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
    stored = {name: t.to(torch.bfloat16).contiguous() for name, t in tensors.items()}
    save_file(stored, folder / f"{stem}.safetensors", metadata={"format": "pt"})


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="work folder of train_demo.py")
    parser.add_argument("checkpoint", type=Path, help="official-layout folder to write")
    parser.add_argument("--ship", type=Path, metavar="FOLDER", help="write the Q8_0 folder as well")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
