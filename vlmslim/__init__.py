"""Visual-token compression for LLaVA-style models, attached in one line.

    import vlmslim

    with vlmslim.patch(model, "divprune", keep=64):
        model.generate(**inputs)

Each of the names below is imported when it is first used, so that `import vlmslim` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmslim.compressor import Compressed, Compressor, ImageTokens, LayerInput, ScoreAndKeep
    from vlmslim.loading import from_pretrained
    from vlmslim.patching import Slim, patch
    from vlmslim.receipt import Receipt
    from vlmslim.registry import method, method_names

__version__ = "0.1.0"
__all__ = [
    "Compressed",
    "Compressor",
    "ImageTokens",
    "LayerInput",
    "Receipt",
    "ScoreAndKeep",
    "Slim",
    "from_pretrained",
    "method",
    "method_names",
    "patch",
]
_MODULES = {
    "compressor": ("Compressed", "Compressor", "ImageTokens", "LayerInput", "ScoreAndKeep"),
    "loading": ("from_pretrained",),
    "patching": ("Slim", "patch"),
    "receipt": ("Receipt",),
    "registry": ("method", "method_names"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"vlmslim.{module}"), name)
    raise AttributeError(f"module 'vlmslim' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
