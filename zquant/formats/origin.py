"""Where a model to convert comes from: a folder, single files, or a Hugging Face repository.

official folder      transformer/ text_encoder/ vae/ scheduler/ tokenizer/
converted folder     model.json and what it names; `demo` is zquant's own
single files         one per component, or one file with all of them
Hugging Face id      owner/name or owner/name@revision, downloaded into the Hugging Face cache
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zquant.errors import CheckpointError, ZQuantError
from zquant.formats.detect import open_source
from zquant.formats.model_folder import ModelFiles, Variant, find_model, model_folder
from zquant.formats.names import COMPONENTS, components_in, dit_parts

__all__ = ["Origin", "find_origin"]

_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")
NETWORK_TIMEOUT_S = 10  # to connect, and to answer
_HUB_FILES = ["*.json", "*.safetensors", "*.txt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A file or folder per component.

    `variant` is None where the files do not say; `manifest` is the content of a `model.json`.
    """

    label: str
    paths: dict[str, Path]
    variant: Variant | None
    tokenizer: Path | None
    manifest: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """The model's name: the last part of the folder or id."""
        return Path(self.label).name or Path(self.label).resolve().name


def find_origin(source: str | None, given: dict[str, Path]) -> Origin:
    """Locate all three components.

    Args:
        source: folder, all-in-one file, or Hugging Face id; None if every component is given.
        given: single files by component; they go before what `source` has.

    Raises:
        CheckpointError: a component is missing.
        ZQuantError: a repository cannot be fetched.
    """
    found = Origin(label="", paths={}, variant=None, tokenizer=None)
    if source is not None:
        found = _located(source)
    paths = {**found.paths, **given}
    missing = [c for c in COMPONENTS if c not in paths]
    if missing:
        flags = ", ".join("--" + c.replace("_", "-") for c in missing)
        raise CheckpointError(
            f"{source or 'the given files'}: no source for {', '.join(missing)}. Give {flags}."
        )
    label = source or ", ".join(paths[c].name for c in COMPONENTS)
    return replace(found, label=label, paths=paths)


def _located(source: str) -> Origin:
    path = model_folder(source)
    if path.is_dir():
        return _from_folder(source, find_model(path))
    if path.is_file():
        return _from_file(source, path)
    hub = _HUB_ID.fullmatch(source)
    if not hub or path.suffix in (".safetensors", ".gguf", ".json"):
        raise CheckpointError(
            f"{source}: no such file or folder, and not a Hugging Face id such as "
            f"Tongyi-MAI/Z-Image-Turbo. Check the path."
        )
    return _from_folder(source, find_model(_downloaded(hub[1], hub[2])))


def _from_file(label: str, path: Path) -> Origin:
    """Every component that the file holds."""
    opened = open_source(path)
    try:
        paths = dict.fromkeys(components_in(opened), path)
        if not paths:
            dit_parts(opened)  # says what the file is instead
    finally:
        opened.close()
    return Origin(label=label, paths=paths, variant=None, tokenizer=None)


def _from_folder(label: str, files: ModelFiles) -> Origin:
    paths = {"dit": files.dit, "text_encoder": files.text_encoder, "vae": files.vae}
    return Origin(
        label=label,
        paths=paths,
        variant=files.variant,
        tokenizer=files.tokenizer,
        manifest=files.manifest,
    )


def _downloaded(repository: str, revision: str | None) -> Path:
    """The repository's snapshot in the Hugging Face cache."""
    from huggingface_hub import snapshot_download  # slow to import, needed only here

    try:
        commit = _commit(repository, revision)
        return Path(snapshot_download(repository, revision=commit, allow_patterns=_HUB_FILES))
    except Exception as error:  # the errors of its HTTP clients share no base class
        with suppress(Exception):  # no network, but perhaps an earlier download
            return Path(
                snapshot_download(
                    repository,
                    revision=revision,
                    allow_patterns=_HUB_FILES,
                    local_files_only=True,
                )
            )
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        at = f" --revision {revision}" if revision else ""
        raise ZQuantError(
            f"{repository}: no such folder here, and it cannot be fetched from Hugging Face "
            f"({reason}). On a machine with network run: hf download {repository}{at} --local-dir "
            f"FOLDER, copy FOLDER here, and run: zquant convert FOLDER OUT"
        ) from error


def _commit(repository: str, revision: str | None) -> str | None:
    """The commit to fetch; asked for with a limit, because a download waits for a dead network."""
    from huggingface_hub import HfApi

    return HfApi().model_info(repository, revision=revision, timeout=NETWORK_TIMEOUT_S).sha
