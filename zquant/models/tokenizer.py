r"""Prompt -> token ids, with the tokenizer of the Qwen3 text encoder.

Byte-level byte-pair encoding: special strings are cut out verbatim, the rest is NFC-normalized,
split by `_SPLIT`, written as one character per UTF-8 byte and merged pair by pair, lowest merge
first. No BOS or EOS is added. The Z-Image prompt is one user turn:

    <|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n

A vocabulary comes with zquant (`Vocabulary.bundled`), from GGUF metadata or from an official
`tokenizer/` folder; all three give the same ids for Qwen2, Qwen2.5 and Qwen3.

Not here: padding and batches (every prompt is encoded alone), prompt weights (the model has none).

Source: transformers `Qwen2TokenizerFast`; llama.cpp `convert_hf_to_gguf.py` for the metadata.
"""

import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, NoReturn

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from zquant.errors import CheckpointError, FormatError
from zquant.formats.remote import AnyPath

__all__ = [
    "CHAT_TEMPLATE",
    "CONTROL",
    "NORMAL",
    "UNUSED",
    "USER_DEFINED",
    "PromptIds",
    "Tokenizer",
    "Vocabulary",
    "gguf_metadata",
    "prompt_ids",
]

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # ggml token types
_USER_TURN = "<|im_start|>user\n"
_ASSISTANT_TURN = "<|im_end|>\n<|im_start|>assistant\n"
_TEMPLATE_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# in the order of their ids, from 151643; those without bars are ordinary text to a decoder
_SPECIALS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> "
    "<|box_start|> <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> "
    "<|vision_pad|> <|image_pad|> <|video_pad|> <tool_call> </tool_call> <|fim_prefix|> "
    "<|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> <tool_response> "
    "</tool_response> <think> </think>"
)
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# far above any published vocabulary; keeps a hostile id from sizing a list
_MAX_TOKENS = 2**20
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}"
    "{%- endif %}"
)


def _alphabet() -> list[str]:
    """The 256 one-byte tokens in the order of their ids: printable bytes first, as in GPT-2."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    # a byte that does not print is written as the next character after 255
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Tokens by id in GPT-2 byte characters, merges in order of priority, ggml token types."""

    tokens: Sequence[str]
    merges: Sequence[tuple[str, str]]
    types: Sequence[int]

    @classmethod
    def bundled(cls) -> "Vocabulary":
        """The Qwen vocabulary that zquant ships: 151643 ordinary tokens and 26 special ones."""
        asset = files("zquant") / "data" / "qwen_vocabulary.zlib"
        planes = np.frombuffer(zlib.decompress(asset.read_bytes()), np.uint8).reshape(2, 3, -1)
        high, middle, low = planes.astype(np.int32).transpose(1, 0, 2)
        left, right = (high << 16 | middle << 8 | low).tolist()
        tokens = _alphabet()
        append = tokens.append
        for a, b in zip(left, right, strict=True):
            append(tokens[a] + tokens[b])
        token = tokens.__getitem__
        merges = list(zip(map(token, left), map(token, right), strict=True))
        specials = _SPECIALS.split()
        types = [NORMAL] * len(tokens) + [_added_type(s, special=False) for s in specials]
        return cls(tokens=tokens + specials, merges=merges, types=types)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], file: str) -> "Vocabulary":
        """From the `tokenizer.ggml.*` values of a GGUF file; `file` names it in messages.

        Raises:
            FormatError: a key is missing or of the wrong kind, or the values contradict each other.
            CheckpointError: the tokenizer is not the one of a Qwen text encoder.
        """
        for key, expected in (("model", "gpt2"), ("pre", "qwen2")):
            found = metadata.get(f"tokenizer.ggml.{key}", "qwen2" if key == "pre" else None)
            if (type(found), found) != (str, expected):
                raise CheckpointError(
                    f"{file}: tokenizer.ggml.{key} is {found!r:.80}, expected {expected!r}. "
                    "The text encoder of Z-Image is Qwen3-4B; use a GGUF file of that model."
                )
        tokens = _strings(metadata, "tokens", file)
        merges = [_pair(line, file) for line in _strings(metadata, "merges", file)]
        types = metadata.get("tokenizer.ggml.token_type")
        types = types.tolist() if isinstance(types, np.ndarray) else types
        if not isinstance(types, (list, tuple)) or not set(map(type, types)) <= {int}:
            _refuse(file, "tokenizer.ggml.token_type is missing or not a list of integers")
        if len(types) != len(tokens):
            _refuse(file, f"tokenizer.ggml.token_type has {len(types)} of {len(tokens)} entries")
        if unknown := set(types) - {NORMAL, CONTROL, USER_DEFINED, UNUSED}:
            _refuse(file, f"tokenizer.ggml.token_type holds {unknown.pop()}, expected 1, 3, 4 or 5")
        return _checked(cls(tokens=tokens, merges=merges, types=types), file)

    @classmethod
    def from_folder(cls, folder: AnyPath) -> "Vocabulary":
        """From an official `tokenizer/` folder: tokenizer.json, or vocab.json with its companions.

        Raises:
            FormatError: a file is missing, is not what its name says, or contradicts another.
            CheckpointError: the tokenizer is not the one of a Qwen text encoder.
        """
        if (folder / "tokenizer.json").is_file():
            file = folder / "tokenizer.json"
            content = _read_json(file)
            model, added = content.get("model"), content.get("added_tokens")
            if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
                raise CheckpointError(f"{file}: not a byte-pair tokenizer, as that of Qwen is.")
            ids, merges = model.get("vocab"), model.get("merges")
        else:
            file = folder / "vocab.json"
            ids = _read_json(file)
            lines = _read_text(folder / "merges.txt").split("\n")
            merges = [line for line in lines[lines[0].startswith("#version") :] if line]
            listed = _read_json(folder / "tokenizer_config.json").get("added_tokens_decoder")
            added = _listed(listed, file)
        if not (isinstance(ids, dict) and isinstance(merges, list) and isinstance(added, list)):
            _refuse(str(file), "the vocabulary, the merges or the added tokens are missing")
        return _checked(_from_ids(ids, merges, added, str(file)), str(file))


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptIds:
    """Token ids of a prompt in its template, and what the token limit cut off."""

    ids: tuple[int, ...]
    n_cut: int  # tokens beyond the limit, closing template tokens included
    cut_text: str  # end of the prompt that was not encoded whole; may be empty although n_cut > 0

    @property
    def notice(self) -> str | None:
        """What to tell the user about the cut; None if nothing was cut."""
        if not self.n_cut:
            return None
        kept = len(self.ids)
        notice = f"the prompt needs {kept + self.n_cut} tokens with its template, {kept} are used"
        if not self.cut_text:
            return f"{notice}; all of its text is read, only the end of the template is cut off"
        shown = self.cut_text if len(self.cut_text) <= 200 else self.cut_text[:200] + "..."
        return f"{notice}; cut off: {shown!r}"


class Tokenizer:
    """Text to ids and back; the same ids as transformers' `Qwen2TokenizerFast`."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        typed = zip(vocabulary.tokens, vocabulary.types, strict=True)
        ids = {t: i for i, (t, kind) in enumerate(typed) if kind != UNUSED}
        # lists: the extension module takes no other sequence
        self._inner = tokenizers.Tokenizer(BPE(vocab=ids, merges=list(vocabulary.merges)))
        self._inner.normalizer = normalizers.NFC()
        self._inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        self._inner.decoder = decoders.ByteLevel()
        typed = zip(vocabulary.tokens, vocabulary.types, strict=True)
        # not normalized: a special string is found before NFC could change its surroundings
        added = [AddedToken(t, normalized=False) for t, k in typed if k in (CONTROL, USER_DEFINED)]
        self._inner.add_special_tokens(added)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special strings in it become their special ids.

        Raises:
            ValueError: `text` holds a lone surrogate and so is not Unicode text.
        """
        return [token for token, _ in self.encode_starts(text)]

    def encode_starts(self, text: str) -> list[tuple[int, int]]:
        """As `encode`, each id with the index in `text` of the first character it covers."""
        if not _is_unicode(text):
            bad = next(i for i, character in enumerate(text) if 0xD800 <= ord(character) < 0xE000)
            raise ValueError(
                f"the text holds a lone surrogate ({text[bad]!r}) at character {bad}, which is not "
                "Unicode text. Remove it or write the character as UTF-8."
            )
        encoding = self._inner.encode(text, add_special_tokens=False)
        return [(i, start) for i, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, specials included; bytes that are not UTF-8 become U+FFFD."""
        return str(self._inner.decode(list(ids), skip_special_tokens=False))


def prompt_ids(tokenizer: Tokenizer, prompt: str, *, max_tokens: int = 512) -> PromptIds:
    """Ids of `prompt` as one user turn, cut to `max_tokens` from the right as the reference does.

    The template and the prompt are tokenized as one string: a newline at the start of the prompt
    joins the template's own. A cut takes the closing template tokens first.

    Raises:
        ValueError: `max_tokens` is not positive, or `prompt` is not Unicode text.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1")
    pairs = tokenizer.encode_starts(_USER_TURN + prompt + _ASSISTANT_TURN)
    ids = tuple(token for token, _ in pairs[:max_tokens])
    if len(pairs) <= max_tokens:
        return PromptIds(ids=ids, n_cut=0, cut_text="")
    # a character whose bytes are split by the cut counts as cut
    start = max(0, pairs[max_tokens][1] - len(_USER_TURN))
    return PromptIds(ids=ids, n_cut=len(pairs) - max_tokens, cut_text=prompt[start:])


def gguf_metadata(vocabulary: Vocabulary, vocab_size: int) -> dict[str, Any]:
    """The `tokenizer.*` values of a GGUF file whose embedding has `vocab_size` rows.

    Raises:
        CheckpointError: the embedding has fewer rows than the vocabulary has tokens.
    """
    n = len(vocabulary.tokens)
    if vocab_size < n:
        raise CheckpointError(
            f"the embedding has {vocab_size} rows, the vocabulary {n} tokens. "
            "Use the tokenizer that belongs to this text encoder."
        )
    end_of_text, _, end_of_turn = map(list(vocabulary.tokens).index, _TEMPLATE_TOKENS)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*vocabulary.tokens, *(f"[PAD{i}]" for i in range(n, vocab_size))],
        "tokenizer.ggml.token_type": [*vocabulary.types, *[UNUSED] * (vocab_size - n)],
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in vocabulary.merges],
        "tokenizer.ggml.bos_token_id": end_of_text,
        "tokenizer.ggml.eos_token_id": end_of_turn,
        "tokenizer.ggml.padding_token_id": end_of_text,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _refuse(file: str, problem: str) -> NoReturn:
    raise FormatError(f"{file}: {problem}. Download the file again or use another tokenizer.")


def _strings(metadata: Mapping[str, Any], key: str, file: str) -> list[str]:
    """A metadata value that must be a list of strings."""
    value = metadata.get(f"tokenizer.ggml.{key}")
    if isinstance(value, str) or not isinstance(value, Sequence):
        _refuse(file, f"tokenizer.ggml.{key} is missing or not a list of strings")
    if len(value) > _MAX_TOKENS:
        _refuse(file, f"tokenizer.ggml.{key} has {len(value)} entries, more than {_MAX_TOKENS}")
    strings = list(value)  # a file's own array decodes its strings here
    if not set(map(type, strings)) <= {str}:
        _refuse(file, f"tokenizer.ggml.{key} is missing or not a list of strings")
    return strings


def _pair(merge: Any, file: str) -> tuple[str, str]:
    """A merge from "a b" or ["a", "b"]: both spellings are in use."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if isinstance(parts, list) and len(parts) == 2:
        a, b = parts
        if isinstance(a, str) and isinstance(b, str):
            return a, b
    _refuse(file, f"merge {merge!r:.80} is not a pair of tokens")


def _read_text(path: AnyPath) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        _refuse(str(path), f"cannot be read ({error.strerror})")
    except UnicodeDecodeError as error:
        _refuse(str(path), f"is not UTF-8 ({error.reason} at byte {error.start})")


def _read_json(path: AnyPath) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        _refuse(str(path), f"is not JSON ({error})")
    if not isinstance(content, dict):
        _refuse(str(path), "is not a JSON object")
    return content


def _listed(decoder: Any, file: AnyPath) -> list[dict[str, Any]]:
    """`added_tokens_decoder` of tokenizer_config.json in the form of tokenizer.json."""
    if not isinstance(decoder, dict) or not all(isinstance(v, dict) for v in decoder.values()):
        _refuse(str(file.with_name("tokenizer_config.json")), "added_tokens_decoder is missing")
    return [{**v, "id": int(i) if i.isdecimal() and len(i) < 20 else i} for i, v in decoder.items()]


def _added_type(token: str, *, special: bool) -> int:
    """CONTROL for what must not be shown: marked special, or written between bars."""
    barred = token.startswith("<|") and token.endswith("|>")
    return CONTROL if special or barred else USER_DEFINED


def _from_ids(ids: dict[str, Any], merges: list[Any], added: list[Any], file: str) -> Vocabulary:
    """A vocabulary from the maps of the official files; ids without a token become unused."""
    kinds = dict.fromkeys(ids, NORMAL)
    ids = dict(ids)
    for entry in added:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            _refuse(file, f"added token {entry!r:.80} has no content")
        ids[entry["content"]] = entry.get("id")
        special = entry.get("special") is True
        kinds[entry["content"]] = _added_type(entry["content"], special=special)
    wrong = [t for t, i in ids.items() if type(i) is not int or not 0 <= i < _MAX_TOKENS]
    if not wrong and len(set(ids.values())) != len(ids):
        shared = Counter(ids.values()).most_common(1)[0][0]
        wrong = [t for t, i in ids.items() if i == shared][1:]
    if wrong:
        found = ids[wrong[0]]
        _refuse(file, f"token {wrong[0]!r} has the id {found!r:.80}, expected its own below 2**20")
    n = max(ids.values(), default=-1) + 1
    tokens, types = [f"[PAD{i}]" for i in range(n)], [UNUSED] * n
    for token, i in ids.items():
        tokens[i], types[i] = token, kinds[token]
    return Vocabulary(tokens=tokens, merges=[_pair(m, file) for m in merges], types=types)


def _checked(vocabulary: Vocabulary, file: str) -> Vocabulary:
    """`vocabulary` if its parts agree and the prompt template can be written in it."""
    typed = zip(vocabulary.tokens, vocabulary.types, strict=True)
    used = [t for t, kind in typed if kind != UNUSED]
    known = set(used)
    if len(known) != len(used):
        _refuse(file, f"token {Counter(used).most_common(1)[0][0]!r} is listed twice")
    # an empty token would match everywhere
    if "" in known or not _is_unicode("".join(used)):
        _refuse(file, "a token is empty or not Unicode text")
    for a, b in vocabulary.merges:
        if not (a in known and b in known and a + b in known):
            _refuse(file, f"merge {a!r} {b!r} refers to a token that the vocabulary lacks")
    added = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    _require(file, (t for t in _TEMPLATE_TOKENS if added.get(t) not in (CONTROL, USER_DEFINED)))
    _require(file, (t for t in _alphabet() if t not in known))
    return vocabulary


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _require(file: str, lacking: Iterable[str]) -> None:
    if missing := list(lacking):
        raise CheckpointError(
            f"{file}: the vocabulary lacks {len(missing)} tokens that a prompt needs (first: "
            f"{missing[0]!r}). Use the tokenizer of Qwen3-4B, the text encoder of Z-Image."
        )
