"""Prompt embeddings kept on disk, so that a prompt is encoded once and not once per run.

    <folder>/<key>.npy = .npy, float32 [T, width] | sha256 of the key and of all bytes before

The key is a hash of everything that decides the embeddings; no prompt is written anywhere. Whatever
is wrong with a file, it is a miss: nothing of it is used before its checksum agrees. Several
processes may share a folder; files appear whole or not at all. Where and how large the cache is, is
the caller's choice.
"""

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from zquant.formats.sealed import read_regular, seal, unseal
from zquant.units import format_bytes

__all__ = ["EmbedCache", "embed_key"]

MAX_FILE_BYTES = 2**28  # 50 times the embeddings of the longest prompt
_KEY_FORMAT = "zquant-embeds-1"
_KEY = re.compile(r"[0-9a-f]{64}")
_OURS = re.compile(r"[0-9a-f]{64}\.npy")
_PART = re.compile(r"[0-9a-f]{64}-\w+\.part")
_STALE_S = 3600  # a part of this age is not being written any more


def embed_key(*, encoder: str, ids: Sequence[int], template: str, compute: str) -> str:
    """The name under which embeddings are kept.

    Args:
        encoder: identifies the text encoder's files.
        ids: token ids of the prompt, template included.
        template: identifies the prompt template.
        compute: identifies dtype and kernels, whose results differ in the last bits.

    Returns:
        Hex sha256.
    """
    # JSON, because its strings and lists cannot run into each other
    parts = [_KEY_FORMAT, encoder, [int(i) for i in ids], template, compute]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class EmbedCache:
    """Embeddings by key; those used least recently are removed when they are too many.

    Attributes:
        reason: why something was last not kept or not used; empty if that never happened.
    """

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.reason = ""

    def get(self, key: str) -> Tensor | None:
        """float32 `[T, width]` on the CPU, or None."""
        path = self._path(key)
        try:
            data = read_regular(path, MAX_FILE_BYTES)
        except FileNotFoundError:
            return None
        except OSError as error:
            self.reason = f"{path}: cannot be read ({error.strerror})"
            return None
        found = None if data is None else unseal(data, key)
        if found is None or found[0].ndim != 2:
            self.reason = f"{path}: damaged; removed, and encoded again"
            _remove(path)
            return None
        with suppress(OSError):  # a cache that cannot be written is still a cache
            _touch(path)
        return found[0]

    def put(self, key: str, embeds: Tensor) -> None:
        """Keep float32 `[T, width]`; where that is impossible, `reason` says why.

        Raises:
            ValueError: `embeds` are not that.
        """
        path = self._path(key)
        if embeds.dtype != torch.float32 or embeds.ndim != 2 or not embeds.numel():
            raise ValueError(
                f"embeds are float32 [T, width]; got {embeds.dtype} {list(embeds.shape)}"
            )
        data = seal(embeds, key)
        if len(data) > self.max_bytes:
            self.reason = (
                f"{self.folder}: the embeddings of one prompt take {format_bytes(len(data))}; the "
                f"cache may take {format_bytes(self.max_bytes)}"
            )
            return
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._write(path, data)
            self._trim(path)
        except OSError as error:
            self.reason = f"{self.folder}: cannot be written ({error.strerror or error})"

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"key {key!r:.80} is not one that embed_key makes")
        return self.folder / f"{key}.npy"

    def _write(self, path: Path, data: bytes) -> None:
        # a name of its own, because another process may write the same key; mode 0600. Not forced
        # to the disk: what a power cut leaves does not agree with its checksum
        handle, part = tempfile.mkstemp(prefix=path.stem + "-", suffix=".part", dir=self.folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            _touch(Path(part))
            Path(part).replace(path)
        finally:
            _remove(Path(part))

    def _trim(self, newest: Path) -> None:
        """Remove the oldest files until the rest fit; `newest` stays."""
        files = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # another process trims, too
                    info = entry.stat(follow_symlinks=False)
                    if _OURS.fullmatch(entry.name):
                        files.append((info.st_mtime_ns, entry.name, info.st_size))
                    elif _PART.fullmatch(entry.name) and time.time() - info.st_mtime > _STALE_S:
                        _remove(Path(entry.path))
        total = sum(size for _, _, size in files)
        for _, name, size in sorted(files):
            if total <= self.max_bytes:
                break
            if name != newest.name:
                _remove(self.folder / name)
                total -= size


def _touch(path: Path) -> None:
    now = time.time_ns()  # finer than the clock that the file system itself would use
    os.utime(path, ns=(now, now))


def _remove(path: Path) -> None:
    with suppress(OSError):  # it is gone, or stays a miss
        path.unlink()
