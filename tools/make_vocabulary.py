"""Build `zquant/data/qwen_vocabulary.zlib` from the rank file of the Qwen tokenizer.

The input is `qwen.tiktoken` of the Apache-2.0 package `dashscope`: one "base64 rank" line per
byte string, in the order in which byte-pair training found them. The first 256 are the single
bytes; every later one was made by merging two earlier ones, so the pairs of ids are the whole
vocabulary: tokens and merges both follow from them (`Vocabulary.bundled` in
`zquant/models/tokenizer.py`).

Layout before compression: six planes of one byte per merge, the bits 23-16, 15-8 and 7-0 of all
left ids, then the same of all right ids. Planes compress 13% better than whole integers.

    pip install --no-deps dashscope==2.0.2
    python tools/make_vocabulary.py
"""

import argparse
import base64
import hashlib
import importlib.util
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np

SOURCE_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
OUT = Path(__file__).parents[1] / "zquant" / "data" / "qwen_vocabulary.zlib"


def installed_source() -> Path:
    """The rank file of the installed dashscope, found without importing the package."""
    spec = importlib.util.find_spec("dashscope")
    if spec is None or spec.origin is None:
        raise SystemExit("dashscope is not installed: pip install --no-deps dashscope==2.0.2")
    return Path(spec.origin).parent / "resources" / "qwen.tiktoken"


def read_ranks(path: Path) -> list[bytes]:
    """Byte strings in the order of their ranks, after checking the file against its checksum."""
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SOURCE_SHA256:
        raise SystemExit(f"{path}: sha256 is {found}, expected {SOURCE_SHA256}")
    tokens = []
    for line in content.splitlines():
        encoded, rank = line.split()
        assert int(rank) == len(tokens)
        tokens.append(base64.b64decode(encoded))
    return tokens


def merged_pair(token: bytes, ranks: dict[bytes, int]) -> tuple[int, int]:
    """Ids of the two parts that byte-pair encoding joins last to make `token`."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        at = min(range(len(pairs)), key=pairs.__getitem__)
        # a merge may only use what was known before this token
        assert pairs[at] < ranks[token]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return ranks[parts[0]], ranks[parts[1]]


def main() -> None:
    """Write the asset and print its size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="qwen.tiktoken; default: that of dashscope")
    tokens = read_ranks(parser.parse_args().source or installed_source())
    ranks = {token: rank for rank, token in enumerate(tokens)}
    pairs = np.array([merged_pair(token, ranks) for token in tokens[256:]], dtype=">u4")
    # [n, 2] big-endian ids -> [n, 2, 4] bytes -> [2, 3, n]: the top byte is always zero
    planes = pairs.view(np.uint8).reshape(-1, 2, 4)[:, :, 1:].transpose(1, 2, 0)
    OUT.write_bytes(zlib.compress(planes.tobytes(), 9))
    print(f"{OUT.name}: {len(tokens)} tokens, {len(pairs)} merges, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
