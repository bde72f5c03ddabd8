"""Where a model to convert comes from: a folder, single files, or a Hugging Face repository.

official folder      transformer/ text_encoder/ vae/ scheduler/ tokenizer/
converted folder     model.json and what it names; `demo` is zquant's own
single files         one per component, or one file with all of them
Hugging Face id      owner/name or owner/name@revision
URL                  http(s):// or hf:// of such a folder or file

A model of the hub that was downloaded before is taken from the Hugging Face cache. Otherwise it is
read by ranges: nothing is downloaded but what is asked for, and nothing of it stays on the disk.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zquant.errors import CheckpointError
from zquant.formats.detect import open_source
from zquant.formats.model_folder import (
    MANIFEST,
    OFFICIAL_FOLDERS,
    ModelFiles,
    Variant,
    find_model,
    model_folder,
    official_variant,
)
from zquant.formats.names import COMPONENTS, components_in, dit_parts
from zquant.formats.remote import AnyPath, RemotePath
from zquant.formats.remote_folder import web_path
from zquant.formats.remote_hub import cached_snapshot, hub_address, hub_path

__all__ = ["Origin", "find_origin"]

_WEIGHTS = (".safetensors", ".gguf", ".json")  # no id ends so


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A file or folder per component.

    `variant` is None where the files do not say; `manifest` is the content of a `model.json`.
    """

    label: str
    paths: Mapping[str, AnyPath]
    variant: Variant | None
    tokenizer: AnyPath | None
    manifest: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """The model's name: the last part of the folder or id."""
        return Path(self.label).name or Path(self.label).resolve().name


def find_origin(source: str | None, given: Mapping[str, str | Path]) -> Origin:
    """Locate all three components.

    Args:
        source: folder, all-in-one file, Hugging Face id or URL; None if every component is given.
        given: single files or their URLs by component; they go before what `source` has.

    Raises:
        CheckpointError: a component is missing.
        ZQuantError: a server cannot be reached or refuses.
    """
    found = Origin(label="", paths={}, variant=None, tokenizer=None)
    if source is not None:
        found = _located(source)
    own = {c: _given(place) for c, place in given.items()}
    paths = {**found.paths, **own}
    missing = [c for c in COMPONENTS if c not in paths]
    if missing:
        flags = ", ".join("--" + c.replace("_", "-") for c in missing)
        raise CheckpointError(
            f"{source or 'the given files'}: no source for {', '.join(missing)}. Give {flags}."
        )
    label = found.label or ", ".join(paths[c].name for c in COMPONENTS)
    return replace(found, label=label, paths=paths)


def _given(place: str | Path) -> AnyPath:
    """A file of the user's; text may be a URL."""
    if isinstance(place, Path) or "://" not in place:
        return Path(place)
    return _remote(place)


def _located(source: str) -> Origin:
    path = model_folder(source)
    if path.is_dir():
        return _from_folder(source, find_model(path))
    if path.is_file():
        return _from_file(source, path)
    is_url = "://" in source
    address = hub_address(source) if is_url or path.suffix not in _WEIGHTS else None
    if not is_url and address is None:
        raise CheckpointError(
            f"{source}: no such file or folder, and not a Hugging Face id such as "
            f"Tongyi-MAI/Z-Image-Turbo. Check the path."
        )
    if address and not address.inside and (cached := cached_snapshot(address)):
        return _from_folder(source.partition("?")[0], find_model(cached))
    found = _from_remote(_remote(source))
    return found if is_url else replace(found, label=source)


def _remote(source: str) -> RemotePath:
    """What an id or URL means."""
    if address := hub_address(source):
        return hub_path(address)
    if source.startswith(("http://", "https://")):
        return web_path(source)
    raise CheckpointError(f"{source}: not an http://, https:// or hf:// address. Check it.")


def _from_remote(path: RemotePath) -> Origin:
    """What an official folder or a file on a server has."""
    if path.is_file():
        return _from_file(str(path), path)
    if (path / MANIFEST).is_file() or not (path / "transformer").is_dir():
        raise CheckpointError(
            f"{path}: not an official model folder; expected transformer/, text_encoder/, vae/ and "
            f"scheduler/. Give the files of another one as --dit, --text-encoder, --vae."
        )
    paths = {part: path / name for part, name in OFFICIAL_FOLDERS.items()}
    missing = [each.name for each in paths.values() if not each.is_dir()]
    if missing:
        raise CheckpointError(f"{path}: lacks {', '.join(missing)}/. Give a whole model.")
    tokenizer = path / "tokenizer"
    return Origin(
        label=str(path),
        paths=paths,
        variant=official_variant(path),
        tokenizer=tokenizer if tokenizer.is_dir() else None,
    )


def _from_file(label: str, path: AnyPath) -> Origin:
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
