"""Tensors that a file carries and no network of ours has: which of them may be left out.

Merging and training tools leave counters, buffers, tokenizers and heads behind. A stray is ignored
when its name is one of these or when it is no weight at all: integers or flags that are not called
a weight. Anything else that is not wanted stays in, for the loader to refuse.
"""

import re

from zquant.errors import FormatError
from zquant.formats.safetensors_file import READABLE_FLOATS
from zquant.formats.source import TensorInfo, quoted

__all__ = ["is_stray"]

_HARMLESS = re.compile(
    r"norm_final\.weight"  # the final norm of the DiT has no weights
    r"|(.*\.)?(position_ids|inv_freq|rope_freqs\.weight|rotary_emb\.\w+|logit_scale)"
    r"|(.*\.)?(spiece_model|tekken_model|tokenizer_json|num_batches_tracked)"
    r"|(optimizer|optimizer_states?|lr_schedulers?|model_ema|ema|ema_model|loss|callbacks)[._].+"
    r"|(global_step|step|epoch|iteration|iter|decay|num_updates|n_averaged|initted)"
    r"|(alphas_cumprod\w*|betas|sigmas|log_sigmas|model_sampling\..+|noise_schedule\..+)"
    r"|(.*\.)?(text_projection|__index_timestep_zero__)"
)
_WEIGHTS = (".weight", ".bias", "_pad_token")


def is_stray(name: str, info: TensorInfo) -> bool:
    """Whether the tensor, under its name without prefix, may be left out.

    Raises:
        FormatError: it is called a weight and is of a type that zquant cannot read.
    """
    if _HARMLESS.fullmatch(name):
        return True
    if info.qtype.is_weight:
        return False
    if name.endswith(_WEIGHTS):
        raise FormatError(
            f"{info.reader.name}: tensor {quoted(info.name)} is {quoted(info.qtype)}, which zquant "
            f"cannot read. Readable: {READABLE_FLOATS}. Use the original bfloat16 or float32 "
            "weights, or a GGUF file."
        )
    return True
