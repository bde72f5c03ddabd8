"""Ids equal to those of transformers and of a short independent byte-pair encoder."""

import json
import random
import unicodedata
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
import transformers

from zquant.models.tokenizer import CONTROL, NORMAL, Tokenizer, Vocabulary

pytestmark = pytest.mark.oracle

TEXTS = """
a red fox in the snow, golden hour, 35mm f/1.8 -- ultra-detailed (8K), "quoted"
It's I'M we're they've she'd you'll 'twas 'S 'LL'D'T don'tcan't rock'n'roll o'clock’s
we'LLama a'Tea 'VEgan X'REd I'Mage 'Day n'Sync 'tea 'llama
一只红色的狐狸在雪地里，黄昏的光线。“引号”《书名》……——！？全角ＡＢＣ１２３ １０年２０１０
赤い狐が雪の中を走る。カタカナ ﾊﾝｶｸ ガギグ が ヴ ー・「」
눈 속의 붉은 여우 각 각
ثعلب أحمر في الثلج، بِسْمِ ٱللَّهِ ١٢٣
שועל אדום בַּשֶּׁלֶג हिन्दी में लोमड़ी १२३ ไทยภาษาน้ำ Việt Nam tiếng ế ệ
Рыжая лиса в снегу. Ελληνικά ς Ά Türkçe İıŞş ﬁ ﬂ ß ẞ Ⅷ ½ ² ①
👩‍👩‍👧‍👦 👍🏽 🇯🇵🇨🇳🇺 🏳️‍🌈 🧑🏿‍🚀 ❤️ ☃︎ 🦊🦊🦊
x = {"a": [1, 2.50, -3e10], 'b': None}; if (x != y && !z) { return *p++; } // 0xDEADBEEF
<|im_start|>user <|im_end|> <|endoftext|> <|im_start <|vision_start|><|vision_end|>x<|image_pad|>
<think></think> <tool_call>{"n": 1}</tool_call> <|fim_prefix|>a<|repo_name|> < |im_end|> [PAD151670]
e\u0301 A\u030a \u1100\u1161\u11a8 \u0b92\u0bd7 q\u0307\u0323 \u212b \u2126 \uf900 \u0344
\u00a0nbsp\u2003em\u3000wide\u200bzero\u200djoin\ufeffbom\u2028line\u2029par\u0085nel \u00ad
12345678901234567890 3.14159 1,000,000 2024-01-02T03:04:05Z №5 ௧௨
\U00020000\U0002a6d6 \U00013000 \U0001d54f \ufffd \U0010ffff \ue000 \x00\x01\x7f
""".strip().split("\n")
SPACES = [" ", "  ", "\n", "\r\n", "\t", "\n\n", " \n", "\n ", "\u3000", "\u00a0", "\r", "\x0b"]
SPECIALS = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<think>", "<|im_", "|>", "'s", "'LL"]
N_RANDOM = 600


@cache
def character_pools() -> list[list[str]]:
    """Characters that every Unicode table since 12.1 knows, by script range."""
    ranges = [(0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x600, 0x700), (0x900, 0xE80)]
    ranges += [(0x1100, 0x1200), (0x2000, 0x2C00), (0x3000, 0x3100), (0x4E00, 0x9000)]
    ranges += [(0xAC00, 0xD7A4), (0x1F1E6, 0x1F700), (0x1F900, 0x1F960), (0x20000, 0x20100)]
    known = unicodedata.ucd_3_2_0.category
    pools = [[chr(c) for c in range(*r) if known(chr(c)) not in ("Cn", "Cs")] for r in ranges]
    return [*(pool for pool in pools if pool), SPACES, SPECIALS, ["e\u0301", "\u200d", "\ufe0f"]]


def random_text(rng: random.Random) -> str:
    pools = rng.choices(character_pools(), k=rng.randint(1, 4))
    return "".join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(1, 60)))


@cache
def corpus() -> list[str]:
    rng = random.Random(20260101)
    whole = ["", "\n".join(TEXTS), "\n\n  ".join(reversed(TEXTS)), "fox " * 300, "狐" * 300]
    runs = ["".join(rng.choices([*SPACES, "a", "1", "."], k=12)) for _ in range(100)]
    return [*TEXTS, *whole, *runs, *(random_text(rng) for _ in range(N_RANDOM))]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.bundled()


@pytest.fixture(scope="module")
def ours(vocabulary: Vocabulary) -> list[list[int]]:
    tokenizer = Tokenizer(vocabulary)
    return [tokenizer.encode(text) for text in corpus()]


@pytest.fixture(scope="module")
def folder(vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An official `tokenizer/` folder with our tokens."""
    path = tmp_path_factory.mktemp("tokenizer")
    ids, added = {}, {}
    for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind == NORMAL:
            ids[token] = i
        else:
            flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
            added[str(i)] = {"content": token, "special": kind == CONTROL, **flags}
    config: dict[str, Any] = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added}
    config |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
    (path / "vocab.json").write_text(json.dumps(ids), "utf-8")
    merges = "".join(f"{a} {b}\n" for a, b in vocabulary.merges)
    (path / "merges.txt").write_text("#version: 0.2\n" + merges, "utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return transformers.Qwen2TokenizerFast.from_pretrained(folder)


def test_ids_equal_transformers(ours: list[list[int]], theirs: Any) -> None:
    assert len(corpus()) > 700
    for text, ids in zip(corpus(), ours, strict=True):
        assert ids == theirs(text)["input_ids"], ascii(text)


def test_decoding_equals_transformers(
    vocabulary: Vocabulary, ours: list[list[int]], theirs: Any
) -> None:
    tokenizer = Tokenizer(vocabulary)
    for ids in ours[:200]:
        assert tokenizer.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


def test_official_folders_give_the_vocabulary_back(
    vocabulary: Vocabulary, folder: Path, theirs: Any, tmp_path: Path
) -> None:
    assert Vocabulary.from_folder(folder) == vocabulary
    theirs.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = Vocabulary.from_folder(tmp_path)
    assert (again.tokens, again.merges) == (vocabulary.tokens, vocabulary.merges)


class ByteRanks:
    """Byte-pair encoding as tiktoken does it: join the pair whose union has the lowest rank."""

    SPLIT = regex.compile(
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def __init__(self, vocabulary: Vocabulary) -> None:
        # GPT-2 writes a byte as itself where that prints and as 256, 257, ... where not
        shown = [b for b in range(256) if chr(b).isprintable() and chr(b) not in " \xa0\xad"]
        hidden = [b for b in range(256) if b not in shown]
        byte_of = {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}
        self.ranks, self.specials = {}, {}
        for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
            if kind == NORMAL:
                self.ranks[bytes(byte_of[c] for c in token)] = i
            else:
                self.specials[token] = i
        self.special = regex.compile("(" + "|".join(map(regex.escape, self.specials)) + ")")

    def encode(self, text: str) -> list[int]:
        ids = []
        for part in self.special.split(text):
            if part in self.specials:
                ids.append(self.specials[part])
                continue
            for piece in self.SPLIT.findall(unicodedata.normalize("NFC", part)):
                ids += self.join([bytes([b]) for b in piece.encode()])
        return ids

    def join(self, parts: list[bytes]) -> list[int]:
        while len(parts) > 1:
            unions = [a + b for a, b in pairwise(parts)]
            best = min(unions, key=lambda union: self.ranks.get(union, len(self.ranks)))
            if best not in self.ranks:
                break
            at = unions.index(best)
            parts[at : at + 2] = [best]
        return [self.ranks[part] for part in parts]


def test_ids_equal_an_independent_encoder(vocabulary: Vocabulary, ours: list[list[int]]) -> None:
    encoder = ByteRanks(vocabulary)
    for text, ids in zip(corpus(), ours, strict=True):
        assert ids == encoder.encode(text), ascii(text)
