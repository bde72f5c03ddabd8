"""The three networks of one model, as files.

Headers are read on opening, weights when a network is built; it is dropped after its phase.

Sources are mapped, so building on the CPU copies almost nothing; `forget` gives the pages back.
"""

import torch

from zquant.errors import CheckpointError
from zquant.formats.detect import open_source
from zquant.formats.model_folder import ModelFiles, source_metadata
from zquant.formats.names import Part, dit_parts, text_encoder_parts, vae_parts
from zquant.models.build import load, on_meta
from zquant.models.config import DiTConfig, TextEncoderConfig, VAEConfig
from zquant.models.dit import DiT
from zquant.models.text_encoder import TextEncoder
from zquant.models.tokenizer import Tokenizer, Vocabulary
from zquant.models.vae import VAE

__all__ = ["Checkpoint"]

_PARTS = {"dit": dit_parts, "text_encoder": text_encoder_parts, "vae": vae_parts}


class Checkpoint:
    """Opened sources of a model; names and sizes are checked at once.

    Raises:
        FormatError: a file cannot be read.
        CheckpointError: a file is not the model it should be, or the parts do not belong together.
    """

    def __init__(self, files: ModelFiles) -> None:
        self.files = files
        self.paths = {"dit": files.dit, "text_encoder": files.text_encoder, "vae": files.vae}
        self.sources = {name: open_source(path) for name, path in self.paths.items()}
        self.parts = {name: _PARTS[name](source) for name, source in self.sources.items()}
        shapes = {
            name: {n: tuple(p.shape) for n, p in parts.items()}
            for name, parts in self.parts.items()
        }
        metadata = {name: source_metadata(source) for name, source in self.sources.items()}
        try:
            self.dit_config = DiTConfig.from_shapes(shapes["dit"], metadata["dit"])
            self.text_encoder_config = TextEncoderConfig.from_shapes(
                shapes["text_encoder"], metadata["text_encoder"]
            )
            self.vae_config = VAEConfig.from_shapes(shapes["vae"])
        except KeyError as error:
            raise CheckpointError(
                f"{files.dit.parent}: tensor {error} is missing. Download or convert it again."
            ) from error
        wants, gives = self.dit_config.cap_feat_dim, self.text_encoder_config.hidden_size
        if wants != gives:
            raise CheckpointError(
                f"{files.text_encoder}: gives embeddings of width {gives}; {files.dit.name} wants "
                f"{wants}. Z-Image needs Qwen3-4B (2560)."
            )

    def dit(self, device: torch.device, compute_dtype: torch.dtype) -> DiT:
        """The transformer with its weights on `device`."""
        module = on_meta(lambda: DiT(self.dit_config))
        module.compute_dtype = compute_dtype
        return load(module, self.parts["dit"], label=str(self.files.dit), device=device)

    def text_encoder(self, device: torch.device, compute_dtype: torch.dtype) -> TextEncoder:
        """The text encoder with its weights on `device`, its embedding table in the file."""
        module = on_meta(lambda: TextEncoder(self.text_encoder_config))
        module.compute_dtype = compute_dtype
        last = self.text_encoder_config.n_layers - 1
        return load(
            module,
            self.parts["text_encoder"],
            label=str(self.files.text_encoder),
            device=device,
            unused=("model.norm.", f"model.layers.{last}."),
        )

    def vae(self, device: torch.device, dtype: torch.dtype) -> VAE:
        """The autoencoder, expanded to `dtype` on `device`."""
        module = on_meta(lambda: VAE(self.vae_config))
        return load(
            module, self.parts["vae"], label=str(self.files.vae), device=device, dtype=dtype
        )

    def tokenizer(self) -> Tokenizer:
        """The model's own tokenizer where it brings one, else the bundled one."""
        source = self.sources["text_encoder"]
        if "tokenizer.ggml.tokens" in source.metadata:
            return Tokenizer(Vocabulary.from_gguf(source.metadata, str(self.files.text_encoder)))
        if self.files.tokenizer is not None:
            return Tokenizer(Vocabulary.from_folder(self.files.tokenizer))
        return Tokenizer(Vocabulary.bundled())

    def forget(self, component: str) -> None:
        """Drop the mapped pages of one component; the system may keep them cached."""
        self.sources[component].forget()

    def close(self) -> None:
        """Close all files."""
        for source in self.sources.values():
            source.close()

    def part(self, component: str, name: str) -> Part:
        """A stored tensor by its official name."""
        return self.parts[component][name]
