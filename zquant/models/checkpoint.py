"""The three networks of one model, as files.

Headers are read on opening, weights when a network is built; it is dropped after its phase.

Sources are mapped, so building on the CPU copies almost nothing; `forget` gives the pages back.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from zquant.errors import CheckpointError
from zquant.formats.detect import open_source
from zquant.formats.model_folder import (
    VARIANTS,
    ModelFiles,
    Variant,
    find_model,
    model_folder,
    source_metadata,
)
from zquant.formats.names import dit_parts, text_encoder_parts, vae_parts
from zquant.formats.producer import rope_notice
from zquant.layers.compute import Compute
from zquant.models.build import check_names, load, on_meta
from zquant.models.config import DiTConfig, TextEncoderConfig, VAEConfig
from zquant.models.dit import DiT
from zquant.models.text_encoder import TextEncoder
from zquant.models.tokenizer import Tokenizer, Vocabulary
from zquant.models.vae import VAE
from zquant.request import RunRequest

__all__ = ["Checkpoint", "model_files"]

DIT_STACKS = ("context_refiner.", "noise_refiner.", "layers.")
_PARTS = {"dit": dit_parts, "text_encoder": text_encoder_parts, "vae": vae_parts}


class Checkpoint:
    """Opened sources of a model; names and sizes are checked at once.

    Raises:
        FormatError: a file cannot be read.
        CheckpointError: a file is not the model it should be, or the parts do not belong together.
    """

    def __init__(self, files: ModelFiles) -> None:
        _check_defaults(files)
        self.files = files
        self.paths = {"dit": files.dit, "text_encoder": files.text_encoder, "vae": files.vae}
        self.sources = {name: open_source(path) for name, path in self.paths.items()}
        self.parts = {name: _PARTS[name](source) for name, source in self.sources.items()}
        shapes = {
            name: {n: tuple(p.shape) for n, p in parts.items()}
            for name, parts in self.parts.items()
        }
        metadata = {name: source_metadata(source) for name, source in self.sources.items()}
        with _about(files.dit):
            self.dit_config = DiTConfig.from_shapes(shapes["dit"], metadata["dit"])
        with _about(files.text_encoder):
            self.text_encoder_config = TextEncoderConfig.from_shapes(
                shapes["text_encoder"], metadata["text_encoder"]
            )
        with _about(files.vae):
            self.vae_config = VAEConfig.from_shapes(shapes["vae"], metadata["vae"])
        self._check_parts_belong_together()
        for component in self.paths:
            self._check_names(component)

    def _check_parts_belong_together(self) -> None:
        files, dit = self.files, self.dit_config
        wants, gives = dit.cap_feat_dim, self.text_encoder_config.hidden_size
        if wants != gives:
            raise CheckpointError(
                f"{files.text_encoder}: gives embeddings of width {gives}; {files.dit.name} wants "
                f"{wants}. Z-Image needs Qwen3-4B (2560)."
            )
        vae = self.vae_config
        if (vae.latent_channels, vae.scale, vae.in_channels) != (dit.in_channels, 8, 3):
            raise CheckpointError(
                f"{files.vae}: turns {vae.latent_channels} channels at 1/{vae.scale} of the size "
                f"into {vae.in_channels}; {files.dit.name} makes {dit.in_channels} channels at 1/8 "
                f"for pictures of 3. Z-Image needs the FLUX.1 autoencoder."
            )

    def _check_names(self, component: str) -> None:
        """Every tensor is there and has its shape, before any work is done."""
        module = self.blank(component)
        unused = self._unused(component)
        check_names(module, self.parts[component], str(self.paths[component]), unused=unused)

    @property
    def _makers(self) -> dict[str, Callable[[], nn.Module]]:
        return {
            "dit": lambda: DiT(self.dit_config),
            "text_encoder": lambda: TextEncoder(self.text_encoder_config),
            "vae": lambda: VAE(self.vae_config),
        }

    def blank(self, component: str) -> nn.Module:
        """The network of that component without any weights."""
        return on_meta(self._makers[component])

    def _unused(self, component: str) -> tuple[str, ...]:
        """Prefixes of tensors that may be there and are not needed."""
        if component != "text_encoder":
            return ()
        return ("model.norm.", f"model.layers.{self.text_encoder_config.n_layers - 1}.")

    def dit(self, device: torch.device, compute: Compute) -> DiT:
        """The transformer, without the linear weights of its blocks; the others on `device`."""
        module = on_meta(lambda: DiT(self.dit_config))
        load(
            module,
            self.parts["dit"],
            label=str(self.files.dit),
            device=device,
            later=lambda name: name.startswith(DIT_STACKS),
        ).use(compute)
        return module

    def text_encoder(self, device: torch.device, compute: Compute) -> TextEncoder:
        """The text encoder, without the linear weights of its layers, its embedding in the file.

        It is always exact: one prompt is too few tokens for int8 to pay.
        """
        module = on_meta(lambda: TextEncoder(self.text_encoder_config))
        module.compute_dtype = compute.dtype
        return load(
            module,
            self.parts["text_encoder"],
            label=str(self.files.text_encoder),
            device=device,
            unused=self._unused("text_encoder"),
            later=lambda name: name.startswith("model.layers."),
        )

    def vae(self, device: torch.device, dtype: torch.dtype) -> VAE:
        """The decoder of the autoencoder, expanded to `dtype` on `device`."""
        return load(
            on_meta(lambda: VAE(self.vae_config, encodes=False)),
            self.parts["vae"],
            label=str(self.files.vae),
            device=device,
            dtype=dtype,
            unused=("encoder.", "quant_conv."),
        )

    def tokenizer(self) -> Tokenizer:
        """The model's own tokenizer where it brings one, else the bundled one."""
        source = self.sources["text_encoder"]
        if "tokenizer.ggml.tokens" in source.metadata:
            return Tokenizer(Vocabulary.from_gguf(source.metadata, str(self.files.text_encoder)))
        if self.files.tokenizer is not None:
            return Tokenizer(Vocabulary.from_folder(self.files.tokenizer))
        return Tokenizer(Vocabulary.bundled())

    @property
    def notices(self) -> list[str]:
        """What the user should know about the files."""
        notice = rope_notice(self.sources["text_encoder"].metadata)
        return [notice] if notice else []

    @property
    def n_blocks(self) -> int:
        """Blocks of one step of the DiT."""
        return self.dit_config.n_layers + self.dit_config.n_refiner_layers

    @property
    def sha256(self) -> dict[str, str]:
        """Hash per file, where `model.json` has them; a file given in place of one has none."""
        listed = (self.files.manifest or {}).get("files", {})
        entries = {part: listed.get(part) for part in self.paths}
        return {p: str(e["sha256"]) for p, e in entries.items() if e and "sha256" in e}

    def forget(self, component: str) -> None:
        """Drop the mapped pages of one component; the system may keep them cached."""
        self.sources[component].forget()

    def close(self) -> None:
        """Close all files."""
        for source in self.sources.values():
            source.close()


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Name the file in what is wrong with it."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def model_files(
    model: str | Path | None, given: dict[str, Path], variant: str | None
) -> ModelFiles:
    """The folder's files with the given ones in their place.

    Args:
        model: a model folder, "demo", or None when all three files are given.
        given: files by component.
        variant: "turbo" or "base"; None believes the folder, and assumes turbo without one.

    Raises:
        ZQuantError: the folder is not a model.
        ValueError: nothing names a component, or the variant is unknown.
    """
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is unknown; known: {', '.join(VARIANTS)}")
    if model is None:
        lacking = [n for n in ("dit", "text_encoder", "vae") if n not in given]
        if lacking:
            flags = ", ".join("--" + n.replace("_", "-") for n in lacking)
            raise ValueError(f"no --model folder is given, and {flags} missing; give either")
        return ModelFiles(
            dit=given["dit"],
            text_encoder=given["text_encoder"],
            vae=given["vae"],
            variant=VARIANTS[variant or "turbo"],
        )
    files = find_model(model_folder(model))
    chosen: Variant = VARIANTS[variant] if variant else files.variant
    paths = {"dit": files.dit, "text_encoder": files.text_encoder, "vae": files.vae, **given}
    manifest = files.manifest
    if manifest is not None:  # what it says about a file is not true of another in its place
        listed = {k: v for k, v in manifest["files"].items() if k not in given}
        manifest = {**manifest, "files": listed}
    return ModelFiles(
        dit=paths["dit"],
        text_encoder=paths["text_encoder"],
        vae=paths["vae"],
        variant=chosen,
        size=files.size,
        tokenizer=files.tokenizer,
        hint=files.hint,
        manifest=manifest,
    )


def _check_defaults(files: ModelFiles) -> None:
    """The model's own steps, shift and guidance must be such as a request may ask for."""
    variant = files.variant
    try:
        RunRequest(
            prompt="any",
            width=files.size[0],
            height=files.size[1],
            steps=variant.steps,
            shift=variant.shift,
            guidance_scale=variant.guidance_scale,
        )
    except ValueError as error:
        raise CheckpointError(
            f"{files.dit.parent}: the model's own {error}. Convert or download it again."
        ) from error
