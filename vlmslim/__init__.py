"""vlmslim: visual-token compression for LLaVA-style models, attached in one line.

    import vlmslim

    with vlmslim.patch(model, "divprune", keep=64):
        model.generate(**inputs)

The names below are loaded on first use, so that `import vlmslim` costs nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "patch": "vlmslim.patching",
    "from_pretrained": "vlmslim.loading",
    "Slim": "vlmslim.patching",
    "Compressor": "vlmslim.compressor",
    "Compressed": "vlmslim.compressor",
    "ImageTokens": "vlmslim.compressor",
    "LayerInput": "vlmslim.compressor",
    "Receipt": "vlmslim.receipt",
    "method": "vlmslim.registry",
    "method_names": "vlmslim.registry",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'vlmslim' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
