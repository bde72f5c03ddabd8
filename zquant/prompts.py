"""Prompts as token ids, and their embeddings: from memory, from disk, or still to be made."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from torch import Tensor

from zquant.errors import CheckpointError
from zquant.formats.embed_cache import EmbedCache, embed_key
from zquant.memory.device import Device
from zquant.models.checkpoint import Checkpoint
from zquant.models.tokenizer import PromptIds, Tokenizer, prompt_ids

__all__ = ["Prompts"]

TEMPLATE = "z-image-1"  # changes when `prompt_ids` gives other ids a meaning
KEPT = 8


class Prompts:
    """What is known about prompts for one text encoder on one device.

    Args:
        checkpoint: whose text encoder it is.
        device: whose dtype and kernels decide the last bits.
        cache: on disk; None is none.
    """

    def __init__(self, checkpoint: Checkpoint, device: Device, cache: EmbedCache | None) -> None:
        self._checkpoint, self._cache = checkpoint, cache
        self._compute = f"{device.compute_dtype} {device.name} {device.paths.families[0].path}"
        self._told = ""  # of the cache's troubles
        self._tokenizer: Tokenizer | None = None
        self._ids: OrderedDict[str, PromptIds] = OrderedDict()
        self._embeds: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's, read when it is first needed."""
        if self._tokenizer is None:
            self._tokenizer = self._checkpoint.tokenizer()
        return self._tokenizer

    def ids(self, prompts: Iterable[str]) -> dict[str, PromptIds]:
        """Token ids of every different prompt.

        Raises:
            CheckpointError: the tokenizer has tokens that the text encoder lacks.
        """
        found = {}
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._ids:
                self._ids[prompt] = self._checked(prompt_ids(self.tokenizer, prompt))
            self._ids.move_to_end(prompt)  # these are the last to go
            found[prompt] = self._ids[prompt]
        while len(self._ids) > max(KEPT, len(found)):
            self._ids.popitem(last=False)
        return found

    def known(self, prompts: Iterable[str]) -> dict[str, Tensor]:
        """Those of the prompts whose embeddings are there: float32 `[T, width]` on the CPU."""
        found = {}
        for prompt, cut in self.ids(prompts).items():
            embeds = self._embeds.get(prompt)
            if embeds is None and self._cache is not None:
                embeds = self._cache.get(self._key(cut))
                embeds = embeds if embeds is None or self._fits(embeds, cut) else None
            if embeds is not None:
                self._keep(prompt, embeds)
                found[prompt] = embeds
        return found

    def learn(self, prompts: Sequence[str], embeds: Sequence[Tensor]) -> None:
        """Keep what the text encoder made of the prompts."""
        ids = self.ids(prompts)
        for prompt, each in zip(prompts, embeds, strict=True):
            self._keep(prompt, each)
            if self._cache is not None:
                self._cache.put(self._key(ids[prompt]), each)

    def trouble(self) -> str:
        """Why the cache on disk does not do its work, said once; empty if it does."""
        reason = self._cache.reason if self._cache is not None else ""
        if reason == self._told:
            return ""
        self._told = reason
        return f"embeddings of prompts on disk: {reason}"

    def _keep(self, prompt: str, embeds: Tensor) -> None:
        self._embeds[prompt] = embeds
        self._embeds.move_to_end(prompt)
        while len(self._embeds) > KEPT:
            self._embeds.popitem(last=False)

    def _key(self, cut: PromptIds) -> str:
        encoder = self._checkpoint.sha256.get("text_encoder")
        if encoder is None:  # no hash: the files' names, sizes and times
            readers = self._checkpoint.sources["text_encoder"].readers
            encoder = repr([reader.stamp for reader in readers])
        return embed_key(encoder=encoder, ids=cut.ids, template=TEMPLATE, compute=self._compute)

    def _fits(self, embeds: Tensor, cut: PromptIds) -> bool:
        width = self._checkpoint.text_encoder_config.hidden_size
        return embeds.shape == (len(cut.ids), width) and bool(embeds.isfinite().all())

    def _checked(self, cut: PromptIds) -> PromptIds:
        n_rows, highest = self._checkpoint.text_encoder_config.vocab_size, max(cut.ids)
        if highest >= n_rows:
            raise CheckpointError(
                f"{self._checkpoint.files.text_encoder}: token {highest} of the prompt has no "
                f"embedding; there are {n_rows}. Z-Image needs Qwen3-4B with its own tokenizer."
            )
        return cut
