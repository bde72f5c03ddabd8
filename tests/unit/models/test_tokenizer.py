"""The tokenizer without any other implementation at hand: known ids, cuts, refusals."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest

from zquant.errors import CheckpointError, FormatError
from zquant.models import tokenizer as module
from zquant.models.tokenizer import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    Tokenizer,
    Vocabulary,
    gguf_metadata,
    prompt_ids,
)

N_QWEN = 151669  # tokens of Qwen3, specials included
N_ROWS = 151936  # rows of its embedding
TEXTS = [
    "a red fox in the snow",
    "雪の中の赤い狐、红色的狐狸",
    "ثعلب أحمر",
    "👩‍👩‍👧‍👦 🇯🇵🏳️‍🌈",
    "def f(x):\n\n\treturn x ** 2  # 42\r\n",
    "it's we'LL <|vision_start|><think>x</think>",
    " \n \t \u3000 end ",
]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.bundled()


@pytest.fixture(scope="module")
def tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    return Tokenizer(vocabulary)


def small(**changes: Any) -> dict[str, Any]:
    """Metadata of a vocabulary with two merges; a change to None removes the key."""
    tokens = [*module._alphabet(), "ab", "abc", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    values = {"model": "gpt2", "pre": "qwen2", "tokens": tokens, "merges": ["a b", "ab c"]}
    values["token_type"] = [NORMAL] * 258 + [CONTROL] * 3
    values |= changes
    return {f"tokenizer.ggml.{k}": v for k, v in values.items() if v is not None}


def write_folder(folder: Path, content: Any) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    return folder


def official(**changes: Any) -> dict[str, Any]:
    """tokenizer.json of the vocabulary of `small`."""
    tokens = small()["tokenizer.ggml.tokens"]
    added = [{"id": 258 + i, "content": t, "special": True} for i, t in enumerate(tokens[258:])]
    model = {"vocab": {t: i for i, t in enumerate(tokens[:258])}, "merges": ["a b", ["ab", "c"]]}
    return {"model": {"type": "BPE", **model}, "added_tokens": added, **changes}


def test_import_reads_no_vocabulary_and_no_heavy_package() -> None:
    code = (
        "import sys\n"
        "opened = []\n"
        "sys.addaudithook(lambda e, a: opened.append(str(a[0])) if e == 'open' else None)\n"
        "import zquant.models.tokenizer\n"
        "assert opened and not [name for name in opened if 'qwen_vocabulary' in name]\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_empty_prompt_is_the_eight_template_tokens(tokenizer: Tokenizer) -> None:
    result = prompt_ids(tokenizer, "")
    assert result.ids == (151644, 872, 198, 151645, 198, 151644, 77091, 198)
    assert (result.n_cut, result.cut_text, result.notice) == (0, "", None)


def test_known_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("Hello, world!") == [9707, 11, 1879, 0]
    assert tokenizer.encode("<|endoftext|><|video_pad|><think></think>") == [
        *(151643, 151656, 151667, 151668)
    ]
    assert tokenizer.encode("") == []


def test_newline_of_the_prompt_joins_the_newline_of_the_template(tokenizer: Tokenizer) -> None:
    # "\n\n" is one token
    assert prompt_ids(tokenizer, "\nfox").ids[2] == tokenizer.encode("\n\n")[0] != 198


def test_composed_and_decomposed_text_get_the_same_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9")


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_long_prompt_is_cut_from_the_right(tokenizer: Tokenizer) -> None:
    prompt = "".join(f"{word} fox, " for word in range(300))
    whole, cut = prompt_ids(tokenizer, prompt, max_tokens=10**6), prompt_ids(tokenizer, prompt)
    assert cut.ids == whole.ids[:512]
    assert cut.n_cut == len(whole.ids) - 512 > 0
    assert cut.cut_text
    assert "<|im_start|>user\n" + prompt == tokenizer.decode(cut.ids) + cut.cut_text
    assert cut.notice is not None
    assert f"needs {len(whole.ids)} tokens with its template, 512 are used" in cut.notice
    assert f"cut off: '{cut.cut_text[:100]}" in cut.notice
    assert len(cut.notice) < 400


def test_a_character_split_by_the_cut_is_reported_as_cut(tokenizer: Tokenizer) -> None:
    prompt = "𓀀𓀁"
    starts = [start for _, start in tokenizer.encode_starts(prompt)]
    assert starts.count(1) > 1
    cut = prompt_ids(tokenizer, prompt, max_tokens=3 + starts.index(1) + 1)
    assert cut.cut_text == "𓀁"


def test_a_cut_that_takes_only_template_tokens_says_so(tokenizer: Tokenizer) -> None:
    n = len(prompt_ids(tokenizer, "a red fox").ids)
    cut = prompt_ids(tokenizer, "a red fox", max_tokens=n - 2)
    assert (cut.n_cut, cut.cut_text) == (2, "")
    assert cut.notice is not None
    assert "only the end of the template is cut off" in cut.notice
    assert prompt_ids(tokenizer, "a red fox", max_tokens=n).notice is None


def test_a_limit_inside_the_opening_template_cuts_the_whole_prompt(tokenizer: Tokenizer) -> None:
    assert prompt_ids(tokenizer, "a red fox", max_tokens=1).cut_text == "a red fox"
    with pytest.raises(ValueError, match="max_tokens is 0; it must be at least 1"):
        prompt_ids(tokenizer, "a red fox", max_tokens=0)


def test_text_that_is_not_unicode_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"lone surrogate .* at character 3"):
        tokenizer.encode("fox\udcff")


def test_bundled_vocabulary_passes_the_checks_of_foreign_ones(vocabulary: Vocabulary) -> None:
    assert module._checked(vocabulary, "bundled") is vocabulary
    assert len(vocabulary.tokens) == len(vocabulary.types) == N_QWEN
    assert len(vocabulary.merges) == 151387
    assert vocabulary.merges[0] == ("Ġ", "Ġ")
    added = {t for t, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind != 1}
    assert added == set(vocabulary.tokens[151643:])
    assert vocabulary.types[151657] == vocabulary.types[151668] == USER_DEFINED
    assert vocabulary.types[151644] == vocabulary.types[151659] == CONTROL


def test_metadata_round_trip(vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    metadata = gguf_metadata(vocabulary, N_ROWS)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == N_ROWS
    assert tokens[N_QWEN:] == [f"[PAD{i}]" for i in range(N_QWEN, N_ROWS)]
    assert set(types[N_QWEN:]) == {UNUSED}
    ids = [metadata[f"tokenizer.ggml.{k}_token_id"] for k in ("bos", "eos", "padding")]
    assert ids == [151643, 151645, 151643]
    metadata["tokenizer.ggml.token_type"] = np.array(types, np.int32)
    again = Vocabulary.from_gguf(metadata, "fox.gguf")
    assert again.merges == vocabulary.merges
    # an unused row has no text
    other = Tokenizer(again)
    assert [other.encode(t) for t in TEXTS] == [tokenizer.encode(t) for t in TEXTS]
    assert len(other.encode("[PAD151700]")) > 1


def test_metadata_needs_a_row_for_every_token(vocabulary: Vocabulary) -> None:
    with pytest.raises(CheckpointError, match="has 151668 rows, the vocabulary 151669 tokens"):
        gguf_metadata(vocabulary, N_QWEN - 1)


@pytest.mark.parametrize("trim", [False, True])
def test_chat_template_writes_the_prompt_template(trim: bool) -> None:
    environment = jinja2.Environment(trim_blocks=trim, lstrip_blocks=trim, autoescape=False)
    template = environment.from_string(module.CHAT_TEMPLATE)
    user = {"role": "user", "content": " a <fox>\n"}
    expected = "<|im_start|>user\n a <fox>\n<|im_end|>\n<|im_start|>assistant\n"
    render = template.render
    assert render(messages=[user], add_generation_prompt=True) == expected
    assert render(messages=[user], add_generation_prompt=True, enable_thinking=True) == expected
    without = render(messages=[user], add_generation_prompt=True, enable_thinking=False)
    assert without == expected + "<think>\n\n</think>\n\n"
    turns = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    assert render(messages=turns) == "".join(
        f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns
    )


def test_small_vocabulary_merges_in_order() -> None:
    tokenizer = Tokenizer(Vocabulary.from_gguf(small(pre=None), "fox.gguf"))
    assert tokenizer.encode("abcab<|im_end|>") == [257, 256, 260]


TOKENS = small()["tokenizer.ggml.tokens"]
TYPES = small()["tokenizer.ggml.token_type"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, "tokens is missing or not a list of strings"),
        ({"tokens": TOKENS[:-1]}, "token_type has 261 of 260 entries"),
        ({"tokens": [*TOKENS[:-1], 7]}, "tokens is missing or not a list of strings"),
        ({"tokens": ["a"] * (2**20 + 1)}, "tokens has 1048577 entries, more than 1048576"),
        ({"tokens": ["b", *TOKENS[1:]]}, "token 'b' is listed twice"),
        ({"token_type": None}, "token_type is missing or not a list of integers"),
        ({"token_type": [[1]] * 261}, "token_type is missing or not a list of integers"),
        ({"token_type": [9, *TYPES[1:]]}, "token_type holds 9, expected 1, 3, 4 or 5"),
        ({"merges": None}, "merges is missing or not a list of strings"),
        ({"merges": ["a b c"]}, "merge 'a b c' is not a pair of tokens"),
        ({"merges": ["ab"]}, "merge 'ab' is not a pair of tokens"),
        ({"merges": ["b a"]}, "merge 'b' 'a' refers to a token that the vocabulary lacks"),
        ({"merges": ["ac b"]}, "merge 'ac' 'b' refers to a token that the vocabulary lacks"),
    ],
)
def test_contradicting_metadata_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=f"^fox.gguf: .*{message}"):
        Vocabulary.from_gguf(small(**changes), "fox.gguf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "model is 'llama', expected 'gpt2'"),
        ({"model": None}, "model is None, expected 'gpt2'"),
        ({"model": np.arange(3)}, r"model is array\(\[0, 1, 2\]\), expected 'gpt2'"),
        ({"pre": "llama-bpe"}, "pre is 'llama-bpe', expected 'qwen2'"),
        ({"token_type": [UNUSED, *TYPES[1:]]}, "lacks 1 tokens that a prompt needs .first: '!'"),
        ({"token_type": [NORMAL] * 261}, "lacks 3 tokens .*<.endoftext.>.*Use the tokenizer of"),
    ],
)
def test_tokenizer_of_another_model_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^fox.gguf: .*{message}"):
        Vocabulary.from_gguf(small(**changes), "fox.gguf")


def test_folder_equals_metadata(tmp_path: Path) -> None:
    expected = Vocabulary.from_gguf(small(), "fox.gguf")
    assert Vocabulary.from_folder(write_folder(tmp_path, official())) == expected


def test_folder_with_a_gap_leaves_its_id_unused(tmp_path: Path) -> None:
    content = official()
    content["added_tokens"][2]["id"] = 262
    vocabulary = Vocabulary.from_folder(write_folder(tmp_path, content))
    assert (vocabulary.tokens[260], vocabulary.types[260]) == ("[PAD260]", UNUSED)
    assert Tokenizer(vocabulary).encode("<|im_end|>") == [262]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "BPE"}}, "the vocabulary, the merges or the added tokens are missing"),
        ({"added_tokens": None}, "the vocabulary, the merges or the added tokens are missing"),
        ({"added_tokens": [3]}, "added token 3 has no content"),
        ({"added_tokens": [{"content": "", "id": 300}]}, "a token is empty or not Unicode text"),
        ({"added_tokens": [{"content": "\ud800", "id": 300}]}, "a token is empty or not Unicode"),
        ({"added_tokens": [{"content": "x"}]}, "token 'x' has the id None"),
        ({"added_tokens": [{"content": "x", "id": -1}]}, "token 'x' has the id -1"),
        ({"added_tokens": [{"content": "x", "id": 10**12}]}, "token 'x' has the id 1000000000000"),
        ({"added_tokens": [{"content": "x", "id": 5}]}, "token 'x' has the id 5, expected its own"),
    ],
)
def test_hostile_folder_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Vocabulary.from_folder(write_folder(tmp_path, official(**changes)))


def test_folder_of_another_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, official(model={"type": "Unigram"}))
    with pytest.raises(CheckpointError, match="not a byte-pair tokenizer"):
        Vocabulary.from_folder(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "tokenizer.json: is not JSON"),
        (b"[" * 10**5, "tokenizer.json: is not JSON"),
        (b"9" * 5000, "tokenizer.json: is not JSON"),
        (b"[]", "tokenizer.json: is not a JSON object"),
        (b"\xff", "tokenizer.json: is not UTF-8"),
    ],
)
def test_damaged_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(FormatError, match=message):
        Vocabulary.from_folder(tmp_path)


def test_folder_without_a_companion_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"vocab\.json: cannot be read"):
        Vocabulary.from_folder(tmp_path)
    (tmp_path / "vocab.json").write_text("{}", "utf-8")
    with pytest.raises(FormatError, match=r"merges\.txt: cannot be read"):
        Vocabulary.from_folder(tmp_path)
    (tmp_path / "merges.txt").write_text("", "utf-8")
    (tmp_path / "tokenizer_config.json").write_text("{}", "utf-8")
    with pytest.raises(FormatError, match=r"tokenizer_config\.json: added_tokens_decoder"):
        Vocabulary.from_folder(tmp_path)
