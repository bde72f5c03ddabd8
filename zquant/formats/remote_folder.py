"""A model folder or single file at a plain http address, which has no listing.

The files of an official folder are asked for by their names; a shard is found when an index names
it. `user:password@` in the address is sent as a login to that host; it and the query stay out of
every message and file.
"""

import base64
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import SplitResult, quote, unquote, urlsplit

from zquant.errors import CheckpointError
from zquant.formats.remote import RemotePath, RemoteTree
from zquant.formats.remote_file import RemoteFile
from zquant.formats.remote_http import MAX_CONNECTIONS, Entry, Refused

__all__ = ["web_path"]

_WEIGHTS = (".safetensors", ".gguf", ".safetensors.index.json")
_COMPONENT = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
_FOLDERS = {
    "": ("model.json", *_COMPONENT),
    "transformer/": _COMPONENT,
    "text_encoder/": _COMPONENT,
    "vae/": _COMPONENT,
    "scheduler/": ("scheduler_config.json",),
    "tokenizer/": _TOKENIZER,
}


def web_path(url: str) -> RemotePath:
    """What is at `url`: a file by its ending, or else a folder.

    Raises:
        CheckpointError: none of the files of a model are there.
        ZQuantError: the server does not answer, or refuses.
    """
    parts = urlsplit(url)
    folder, _, name = parts.path.rstrip("/").rpartition("/")
    if name.lower().endswith(_WEIGHTS):  # anything else is a folder
        tree = _tree(parts, folder)
        path = RemotePath(tree, unquote(name))
        path.open_file()  # says at once what is wrong with the address
        return path
    tree = _tree(parts, parts.path.rstrip("/"))
    _ask_all(tree)
    if not tree.opened:
        raise CheckpointError(
            f"{tree.label}: none of the files of a model are there; expected transformer/, "
            f"text_encoder/, vae/ and scheduler/ below it, or the address of a file that ends in "
            f".safetensors or .gguf. Check the address."
        )
    return RemotePath(tree, "")


def _tree(parts: SplitResult, folder: str) -> RemoteTree:
    host = parts.netloc.rpartition("@")[2]
    label = f"{parts.scheme}://{host}{unquote(folder)}"
    login = _login(parts)

    def entry(inside: str) -> Entry:
        path = f"{folder}/{quote(inside)}"
        url = parts._replace(netloc=host, path=path, fragment="").geturl()
        return Entry(name=f"{label}/{inside}", url=url, login=login)

    def find(inside: str) -> RemoteFile | None:
        try:
            return RemoteFile(entry(inside))
        except Refused as error:
            # some stores answer 403 for what is missing; that counts only if nothing is there
            if error.status in (404, 410) or (error.status in (401, 403) and tree.opened):
                return None
            raise

    tree = RemoteTree(label=label, entries={}, find=find)
    return tree


def _login(parts: SplitResult) -> dict[str, str]:
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
    return {"Authorization": f"Basic {base64.b64encode(pair).decode()}"}


def _ask_all(tree: RemoteTree) -> None:
    """Find out which files are there, several at a time."""

    def ask(inside: str) -> Refused | None:
        try:
            tree.has(inside)
        except Refused as error:
            return error
        return None

    names = [folder + name for folder, names in _FOLDERS.items() for name in names]
    with ThreadPoolExecutor(MAX_CONNECTIONS) as pool:
        refusals = [error for error in pool.map(ask, names) if error]
    if refusals and not tree.opened:
        raise refusals[0]
