"""Evaluation through lmms-eval. Importing this package loads neither lmms-eval nor torch."""


def manifest():
    """What the entry point `lmms_eval.models` hands to lmms-eval: the models `vlmslim` and `vlmslim_chat`.

    `vlmslim` speaks lmms-eval's simple protocol, the only one that carries every kind of request; a task's
    `doc_to_messages` is honoured all the same. `vlmslim_chat` is the same implementation behind the chat protocol.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    module = "vlmslim.evaluation.lmms_model"
    return [
        ModelManifest("vlmslim", simple_class_path=f"{module}.VlmSlim"),
        ModelManifest("vlmslim_chat", chat_class_path=f"{module}.VlmSlimChat"),
    ]
