"""Files from the hub, without minutes of retries if it is out of reach."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants, hf_hub_download, snapshot_download, try_to_load_from_cache

OUT_OF_REACH = "the hub is out of reach (or HF_HUB_OFFLINE is set)"
_SUBFOLDERS = "*/*"


def folder(
    repository: str,
    revision: str | None,
    patterns: Sequence[Sequence[str]],
    is_complete: Callable[[Path], bool],
    option: str,
) -> Path:
    """Get the folder of a repository on the hub, from the local cache or by download; without its subfolders.

    Files of the first group of `patterns` are downloaded, and those of the next as long as the folder is not complete.
    A complete folder in the cache is not checked for newer files. FileNotFoundError, within 2 seconds if the hub is out
    of reach, with the one download command and the `option` that takes a local path instead.
    """
    cached = try_to_load_from_cache(repository, "config.json", revision=revision)
    if isinstance(cached, str) and is_complete(Path(cached).parent):
        return Path(cached).parent
    named, at = (f"{repository}@{revision}", f" --revision {revision}") if revision else (repository, "")
    remedy = f"run `hf download {repository}{at}` where there is a network, or give a local path as {option}"
    if not in_reach():
        raise FileNotFoundError(f"{named} is not in the local cache and {OUT_OF_REACH}: {remedy}")
    for group in patterns:
        try:
            place = snapshot_download(
                repository, revision=revision, allow_patterns=list(group), ignore_patterns=_SUBFOLDERS
            )
        except Exception as error:  # those of the hub, of its HTTP client and of the disk have no base in common
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise FileNotFoundError(f"{named} cannot be downloaded ({why}): {remedy}") from None
        if is_complete(Path(place)):
            break
    return Path(place)


def file(repository: str, name: str, option: str) -> Path:
    """Get a file of a repository on the hub, from the local cache or by download.

    FileNotFoundError, within 2 seconds if the hub is out of reach, with the download command and the `option` that
    takes a local path instead.
    """
    cached = try_to_load_from_cache(repository, name)
    if isinstance(cached, str):
        return Path(cached)
    remedy = f"run `hf download {repository} {name}` where there is a network, or give a local path as {option}"
    if not in_reach():
        raise FileNotFoundError(f"{repository}/{name} is not in the local cache and {OUT_OF_REACH}: {remedy}")
    try:
        return Path(hf_hub_download(repository, name))
    except (OSError, ValueError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"{repository}/{name} cannot be downloaded ({why}): {remedy}") from None


def in_reach(seconds: float = 1.5) -> bool:
    """Whether the hub accepts a connection and HF_HUB_OFFLINE is not set; proxies are assumed to work."""
    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return True
    url = urlsplit(constants.ENDPOINT)
    answers: list[bool] = []

    def connect() -> None:
        port = url.port or (443 if url.scheme == "https" else 80)
        try:
            socket.create_connection((url.hostname, port), seconds).close()
        except OSError:
            return
        answers.append(True)

    # In a thread, because looking up the address has no time limit of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)
