"""A model on the Hugging Face hub: from the local cache if it is whole there, or else by ranges.

    owner/name   owner/name@revision   hf://owner/name[@revision][/path]
    https://huggingface.co/owner/name[/tree|blob|resolve/revision[/path]]

The hub's listing gives the commit, and every file's size and hash; all reading is at that commit.
`huggingface_hub` knows the endpoint (HF_ENDPOINT), the login, the cache and offline mode.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from zquant.errors import CheckpointError, ZQuantError
from zquant.formats.detect import open_source
from zquant.formats.model_folder import find_model
from zquant.formats.remote import RemotePath, RemoteTree
from zquant.formats.remote_http import Entry

__all__ = ["HubAddress", "cached_snapshot", "hub_address", "hub_path"]

NETWORK_TIMEOUT_S = 10  # to connect, and to answer
_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")
_HF = re.compile(r"hf://([\w-][\w.-]*/[\w-][\w.-]*)(?:@([^/]+))?(?:/(.*))?")
_WEB = re.compile(r"/([\w-][\w.-]*/[\w-][\w.-]*)(?:/(?:tree|blob|resolve)/([^/]+)(?:/(.*))?)?")
_FILES = ("*.json", "*.safetensors", "*.txt")
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")


@dataclass(frozen=True, slots=True)
class HubAddress:
    """A repository, or a file or folder of it; `revision` None is the newest."""

    repository: str
    revision: str | None
    inside: str = ""


def hub_address(source: str) -> HubAddress | None:
    """What an id or URL means on the hub; None if it is none of the hub's."""
    if found := _ID.fullmatch(source):
        return HubAddress(found[1], found[2])
    if found := _HF.fullmatch(source):
        revision = unquote(found[2]) if found[2] else None
        return HubAddress(found[1], revision, (found[3] or "").strip("/"))
    parts = urlsplit(source)
    if parts.scheme not in ("http", "https") or parts.netloc not in _hub_hosts():
        return None
    if found := _WEB.fullmatch(parts.path.rstrip("/")):
        revision = unquote(found[2]) if found[2] else None
        return HubAddress(found[1], revision, unquote(found[3] or ""))
    return None


def cached_snapshot(address: HubAddress) -> Path | None:
    """The folder of an earlier download, if no file of the model is missing there."""
    from huggingface_hub import snapshot_download  # slow to import, needed only here

    with suppress(Exception):  # its kinds differ between versions; all mean: not here
        folder = Path(
            snapshot_download(
                address.repository,
                revision=address.revision,
                allow_patterns=list(_FILES),
                local_files_only=True,
            )
        )
        return folder if _is_whole(folder) else None
    return None


def hub_path(address: HubAddress) -> RemotePath:
    """The repository, file or folder at the commit that it has now.

    Raises:
        CheckpointError: there is no such file or folder.
        ZQuantError: the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi, hf_hub_url

    repository, api = address.repository, HfApi()
    try:
        info = api.model_info(
            repository,
            revision=address.revision,
            timeout=NETWORK_TIMEOUT_S,
            files_metadata=True,
        )
    except Exception as error:  # the errors of its HTTP clients share no base class
        raise _unreachable(address, error) from error
    at = f"@{address.revision}" if address.revision else ""
    label = f"hf://{repository}{at}"
    login, entries = _login(), {}
    for file in info.siblings or []:
        inside = file.rfilename
        if not inside.isprintable():
            continue  # no file of a model, and it would be printed
        url = hf_hub_url(repository, inside, revision=info.sha, endpoint=api.endpoint)
        entries[inside] = Entry(
            name=f"{label}/{inside}",
            url=url,
            login=login,
            size=file.size,
            digest=_digest(file),
            pinned=True,
        )
    path = RemotePath(RemoteTree(label=label, entries=entries), address.inside)
    if not path.exists():
        raise CheckpointError(f"{path}: the repository has no such file or folder.")
    return path


def _is_whole(folder: Path) -> bool:
    """Whether every component can be opened, and the small files beside them are there."""
    try:
        files = find_model(folder)
        for path in (files.dit, files.text_encoder, files.vae):
            open_source(path).close()
            if files.manifest is None and not (path / "config.json").is_file():
                return False
    except ZQuantError:
        return False
    return files.manifest is not None or files.tokenizer is not None


def _login() -> dict[str, str]:
    """The user's token, as `hf auth login` or HF_TOKEN set it."""
    from huggingface_hub import constants, get_token

    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _digest(file: Any) -> str | None:
    """The hash in a listing: of the content for large files, of the git blob for others."""
    if file.lfs is not None:
        return f"sha256:{file.lfs.sha256}"
    return f"git:{file.blob_id}" if file.blob_id else None


def _hub_hosts() -> tuple[str, ...]:
    from huggingface_hub import constants

    return (*_HOSTS, urlsplit(constants.ENDPOINT).netloc)


def _unreachable(address: HubAddress, error: Exception) -> ZQuantError:
    """Why the listing was not given, and the way without a network."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    repository, revision = address.repository, address.revision
    if isinstance(error, (GatedRepoError, RepositoryNotFoundError)):
        return ZQuantError(
            f"{repository}: no such folder here, and no such model on Hugging Face for you. Check "
            f"the spelling; a gated or private model needs its terms accepted on its page and a "
            f"login: hf auth login"
        )
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    at = f" --revision {revision}" if revision else ""
    return ZQuantError(
        f"{repository}: no such folder here, and it cannot be fetched from Hugging Face "
        f"({reason}). On a machine with network run: hf download {repository}{at} --local-dir "
        f"FOLDER, copy FOLDER here, and run: zquant convert FOLDER OUT"
    )
