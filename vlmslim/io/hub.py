"""Ask once whether the hub answers, because its client repeats every request for half a minute."""

import os
import threading
import time
from functools import lru_cache
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import get_session

SECONDS = 5  # to wait for an answer
_VALID = 60  # seconds for which an answer counts


def how_to_ask() -> dict[str, Any]:
    """Return arguments for a function of transformers that may load from the hub: without a network, the cache alone.

    A checkpoint that was downloaded before loads at once without a network, and one that was not is refused at once.
    """
    return {"local_files_only": True} if is_unreachable() else {}


def how_to_load(name: str | os.PathLike[str]) -> dict[str, Any]:
    """Return arguments for a function of transformers that loads `name`; none for a folder, which asks no hub."""
    return {} if os.path.isdir(name) else how_to_ask()


def is_unreachable() -> bool:
    """Tell whether the hub cannot be asked: it is switched off by HF_HUB_OFFLINE, or it does not answer."""
    return constants.HF_HUB_OFFLINE or not _answers(constants.ENDPOINT, int(time.monotonic() // _VALID))


def hint(name: str) -> str:
    """Say what to do about a repository that could not be loaded; nothing if the hub answers."""
    if not is_unreachable():
        return ""
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
    return (
        f"{name} is not on this machine, and {reason}: give the folder of a checkpoint, or download it where there is "
        f"a network (hf download {name})"
    )


@lru_cache(maxsize=4)
def _answers(endpoint: str, _minute: int) -> bool:
    """Ask for the headers of the hub's first page. Any answer counts, also a refusal."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=SECONDS)
            answers.append(True)
        except Exception:  # each version of huggingface_hub brings another HTTP library with its own exceptions
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)  # because a name server may take longer than any timeout
    thread.start()
    thread.join(SECONDS + 1)
    return answers == [True]
