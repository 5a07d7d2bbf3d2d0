"""Evaluation through lmms-eval. Importing this package loads neither lmms-eval nor torch."""

import os

# Read when `datasets` is imported: without it, even data that are on this machine are counted on a server.
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")


def manifest() -> list:
    """Return what the entry point `lmms_eval.models` gives to lmms-eval: the models `vlmslim` and `vlmslim_chat`.

    `vlmslim` uses lmms-eval's simple protocol, because only that carries every kind of request; it honours a task's
    `doc_to_messages` all the same. `vlmslim_chat` is the same implementation for the chat protocol.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    module = "vlmslim.evaluation.lmms_model"
    return [
        ModelManifest("vlmslim", simple_class_path=f"{module}.VlmSlim"),
        ModelManifest("vlmslim_chat", chat_class_path=f"{module}.VlmSlimChat"),
    ]
