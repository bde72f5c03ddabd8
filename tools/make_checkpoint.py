"""Write a Z-Image checkpoint with random weights, in the official folder layout or ComfyUI's.

    python tools/make_checkpoint.py OUT --preset tiny|wide|full [--layers N] [--comfy]

The tree, tensor names, shapes, dtypes, shard split and configs are those of the published
checkpoints, so that a loader meets what it meets in the field without a 33 GB download. Weights are
Student-t noise (heavy tails, as trained weights have) scaled by 1/sqrt(fan_in); norm weights
scatter around 1. A tensor's values depend on its official name and the seed only, so both layouts
of one seed hold the same model. Its pictures are noise: the shape of Z-Image, not its skill.

Tensors are streamed from one small pool of random numbers, which keeps a full checkpoint at the
speed of the disk and the memory at a few hundred MiB.
"""

import argparse
import functools
import json
import math
import shutil
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from checkpoint_layout import (
    COMPONENTS,
    CONFIGS,
    PRESETS,
    SHAPES,
    Shape,
    comfy_files,
    scheduler_config,
    tokenizer_files,
)

from zquant.models.tokenizer import Vocabulary

ITEMSIZE = {"F32": 4, "BF16": 2}
POOL = 2**22  # random numbers, reused from a different offset by every tensor
TAIL = 6  # degrees of freedom: the largest of a million weights lies about 10 deviations out

# payload limit of a shard / payload of the component as published; keeps small models sharded too
SHARD_SHARE = {
    ("transformer", "F32"): 10e9 / 24_619_634_944,
    ("transformer", "BF16"): 10e9 / 12_309_817_472,
    ("text_encoder", "BF16"): 4e9 / 8_044_936_192,
}
STEMS = {"transformer": "diffusion_pytorch_model", "text_encoder": "model"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """Which checkpoint: `dtype` is the transformer's; the others are BF16, as published."""

    preset: str = "tiny"
    layers: int | None = None
    dtype: str = "bfloat16"
    variant: str = "turbo"
    seed: int = 0
    only: tuple[str, ...] = COMPONENTS

    def stored(self, component: str) -> str:
        """Safetensors dtype of the component in the folder."""
        return "F32" if component == "transformer" and self.dtype == "float32" else "BF16"

    def config(self, component: str) -> dict[str, Any]:
        """The component's config.json."""
        config = CONFIGS[component] | PRESETS[self.preset][component]
        if component == "transformer" and self.layers is not None:
            config["n_layers"] = self.layers
        if component == "transformer" and self.variant == "base":
            config["siglip_feat_dim"] = None
        if component == "text_encoder":
            if self.layers is not None:
                config["num_hidden_layers"] = self.layers + 2
            config["max_window_layers"] = config["num_hidden_layers"]
        return config

    def shapes(self, component: str) -> dict[str, Shape]:
        """Every tensor of the component."""
        return dict(SHAPES[component](self.config(component)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor of a file: the rows of the official tensors `parts`, one after the other.

    `via` is the folder's dtype; the values are rounded to it first, so that every layout agrees.
    """

    name: str
    dtype: str
    via: str
    parts: Sequence[tuple[str, Shape]]
    shape: Shape
    metadata: bool = True  # the file says {"format": "pt"}; ComfyUI's do not

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


def folder_files(spec: Spec) -> dict[str, list[Entry]]:
    """Relative path -> tensors of every safetensors file of the official folder."""
    files = {}
    for component in spec.only:
        dtype = spec.stored(component)
        entries = [
            Entry(name=name, dtype=dtype, via=dtype, parts=[(name, shape)], shape=shape)
            for name, shape in spec.shapes(component).items()
        ]
        if component == "vae":
            files["vae/diffusion_pytorch_model.safetensors"] = entries
            continue
        limit = SHARD_SHARE[component, dtype] * sum(entry.nbytes for entry in entries)
        shards = _split(entries, limit)
        for i, shard in enumerate(shards, start=1):
            name = f"{STEMS[component]}-{i:05d}-of-{len(shards):05d}.safetensors"
            files[f"{component}/{name}"] = shard
    return files


def _split(entries: list[Entry], limit: float) -> list[list[Entry]]:
    """Shards filled in order until the next tensor would pass `limit` bytes."""
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.nbytes for e in shards[-1]) + entry.nbytes > limit:
            shards.append([])
        shards[-1].append(entry)
    return shards


def single_files(spec: Spec, *, prefix: str = "") -> dict[str, list[Entry]]:
    """File name -> tensors of ComfyUI's single files: fused BF16 DiT, BF16 encoder, F32 VAE."""
    files = {}
    for component in spec.only:
        file, rename = comfy_files(prefix=prefix)[component]
        shapes, entries = spec.shapes(component), []
        for name, officials in rename(list(shapes)):
            shape = shapes[officials[0]]
            shape = (len(officials) * shape[0], *shape[1:])
            if component == "vae" and ".attn_1." in name and len(shape) == 2:
                shape = (*shape, 1, 1)
            parts = [(official, shapes[official]) for official in officials]
            dtype = "F32" if component == "vae" else "BF16"
            entries.append(
                Entry(
                    name=name,
                    dtype=dtype,
                    via=spec.stored(component),
                    parts=parts,
                    shape=shape,
                    metadata=False,
                )
            )
        files[file] = entries
    return files


@functools.cache
def _noise() -> npt.NDArray[np.float32]:
    """The pool: Student-t with unit variance."""
    noise = np.random.default_rng(20251126).standard_t(TAIL, POOL)
    return (noise * math.sqrt((TAIL - 2) / TAIL)).astype(np.float32)


def _encode(values: npt.NDArray[np.float32], dtype: str, via: str) -> npt.NDArray[Any]:
    """float32 values as stored: BF16 is uint16, rounded half to even."""
    if dtype == via == "F32":
        return values
    bits = values.view(np.uint32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return bits.astype(np.uint16) if dtype == "BF16" else (bits << 16).view(np.float32)


@functools.lru_cache(maxsize=16)
def _pool(mean: float, std: float, dtype: str, via: str) -> npt.NDArray[Any]:
    return _encode(_noise() * np.float32(std) + np.float32(mean), dtype, via)


def _moments(name: str, shape: Shape) -> tuple[float, float]:
    """Mean and deviation of a tensor."""
    if name.endswith("pad_token"):
        return 0.0, 0.5
    if name == "model.embed_tokens.weight":
        return 0.0, 0.02
    if len(shape) == 1:
        return (1.0, 0.15) if name.endswith("weight") else (0.0, 0.1)
    return 0.0, 1 / math.sqrt(math.prod(shape[1:]))


def draw(name: str, shape: Shape, *, seed: int, dtype: str, via: str) -> Iterator[npt.NDArray[Any]]:
    """The stored values of an official tensor, row-major, in pieces."""
    mean, std = _moments(name, shape)
    rng, left = np.random.default_rng((seed, zlib.crc32(name.encode()))), math.prod(shape)
    while left:
        n = min(left, int(rng.integers(POOL // 2, POOL)))
        start = int(rng.integers(0, POOL - n + 1))
        if left <= POOL // 16:  # too few to be worth a pool of their own
            values = _noise()[start : start + n] * np.float32(std) + np.float32(mean)
            yield _encode(values, dtype, via)
        else:
            yield _pool(mean, std, dtype, via)[start : start + n]
        left -= n


def header_bytes(entries: Sequence[Entry]) -> tuple[bytes, list[Entry]]:
    """The safetensors header, length included, and the tensors in file order."""
    ordered = sorted(entries, key=lambda e: e.name)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if entries[0].metadata else {}
    at = 0
    for e in ordered:
        header[e.name] = {"dtype": e.dtype, "shape": e.shape, "data_offsets": [at, at + e.nbytes]}
        at += e.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, ordered


def file_size(entries: Sequence[Entry]) -> int:
    """Bytes of the safetensors file."""
    return len(header_bytes(entries)[0]) + sum(e.nbytes for e in entries)


def _write_file(file: BinaryIO, entries: Sequence[Entry], seed: int) -> None:
    header, ordered = header_bytes(entries)
    file.write(header)
    for entry in ordered:
        for name, shape in entry.parts:
            for values in draw(name, shape, seed=seed, dtype=entry.dtype, via=entry.via):
                file.write(memoryview(values))


def _write_files(out: Path, files: dict[str, list[Entry]], seed: int) -> None:
    """Every safetensors file, after a check of the disk; progress goes to stderr."""
    total = sum(map(file_size, files.values()))
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    if total > free - 2**28:
        raise SystemExit(
            f"{out}: the checkpoint takes {total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are "
            "free. Choose another disk or a smaller preset."
        )
    for name, entries in files.items():
        started, size = time.perf_counter(), file_size(entries)
        (out / name).parent.mkdir(exist_ok=True)
        with (out / name).open("wb") as file:
            _write_file(file, entries, seed)
        seconds = time.perf_counter() - started
        print(f"{name}: {size / 2**30:.2f} GiB in {seconds:.1f} s", file=sys.stderr)


def _write_json(path: Path, content: Any, *, end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + end, encoding="utf-8")


def _write_index(out: Path, component: str, files: dict[str, list[Entry]]) -> None:
    shards = {Path(f).name: e for f, e in files.items() if f.startswith(component + "/")}
    total = sum(entry.nbytes for entries in shards.values() for entry in entries)
    where = sorted((entry.name, shard) for shard, entries in shards.items() for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": dict(where)}
    _write_json(out / component / f"{STEMS[component]}.safetensors.index.json", index)


def _write_configs(out: Path, spec: Spec) -> None:
    classes = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3Model"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    model = {"_class_name": "ZImagePipeline", "_diffusers_version": "0.36.0.dev0"} | classes
    _write_json(out / "model_index.json", model)
    scheduler = scheduler_config(spec.variant)
    _write_json(out / "scheduler" / "scheduler_config.json", scheduler, end="")
    for component in spec.only:
        end = "" if component == "text_encoder" else "\n"
        _write_json(out / component / "config.json", spec.config(component), end=end)
    if spec.variant == "base" and "text_encoder" in spec.only:
        generation = {"bos_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643]}
        _write_json(out / "text_encoder" / "generation_config.json", generation)


def _write_tokenizer(out: Path) -> None:
    vocabulary = Vocabulary.bundled()
    merges = [" ".join(pair) for pair in vocabulary.merges]
    tokens = list(vocabulary.tokens[: 256 + len(merges)])  # the special ones follow
    out.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer_files(tokens, merges).items():
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        (out / name).write_text(text, encoding="utf-8")
    (out / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")


def make_checkpoint(out: Path, spec: Spec) -> Path:
    """Write the official diffusers folder.

    Args:
        out: folder to create; files in it are overwritten.
        spec: which checkpoint.

    Returns:
        `out`.
    """
    files = folder_files(spec)
    _write_files(out, files, spec.seed)
    _write_configs(out, spec)
    for component in STEMS.keys() & set(spec.only):
        _write_index(out, component, files)
    if "text_encoder" in spec.only:
        _write_tokenizer(out / "tokenizer")
    return out


def make_comfy(out: Path, spec: Spec, *, prefix: str = "") -> Path:
    """Write the same weights as ComfyUI's single files; `prefix` goes before the DiT's names."""
    _write_files(out, single_files(spec, prefix=prefix), spec.seed)
    return out


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--layers", type=int, help="DiT blocks; the text encoder gets two more")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--variant", choices=("turbo", "base"), default="turbo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(COMPONENTS), help="components, comma-separated")
    parser.add_argument("--comfy", action="store_true", help="ComfyUI's single files instead")
    parser.add_argument("--prefix", default="", help="with --comfy: goes before the DiT's names")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = _parser()
    args = vars(parser.parse_args(argv))
    out, comfy, prefix = args.pop("out"), args.pop("comfy"), args.pop("prefix")
    only = tuple(args.pop("only").split(","))
    if unknown := set(only) - set(COMPONENTS):
        parser.error(f"--only: {', '.join(sorted(unknown))}: expected {', '.join(COMPONENTS)}")
    spec = Spec(**args, only=only)
    if comfy:
        make_comfy(out, spec, prefix=prefix)
    else:
        make_checkpoint(out, spec)
    return 0


if __name__ == "__main__":
    sys.exit(main())
