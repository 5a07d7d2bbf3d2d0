"""YAML that a user wrote: bounded work, no key given twice, and every mistake in one sentence."""

from pathlib import Path
from typing import Any

import yaml

LARGEST = 2**20  # bytes of a file
MOST_NODES = 20_000  # values, each alias counted as what it stands for
DEEPEST = 50  # lists and mappings inside each other


class StrictLoader(yaml.SafeLoader):
    """Reads YAML, and refuses a key that is given twice instead of taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Build a mapping, without a key that is given twice."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict | set):
                raise ValueError(f"line {key_node.start_mark.line + 1}: a list or a mapping cannot be a key")
            if key in seen:
                raise ValueError(f"line {key_node.start_mark.line + 1}: the key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, loader: type[yaml.SafeLoader] = StrictLoader) -> Any:
    """Read a YAML file.

    Args:
        path: of the file.
        loader: reads it; by default one that knows no tags and refuses a key that is given twice.

    Raises:
        ValueError: what is wrong, as the end of a sentence that begins with the name of the file.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise ValueError(f"is larger than {LARGEST >> 20} MiB, which no configuration is")
        text = data.decode("utf-8")
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {error.start + 1})") from error
    return parse_yaml(text, loader)


def parse_yaml(text: str, loader: type[yaml.SafeLoader] = StrictLoader) -> Any:
    """Read a YAML text as `read_yaml` reads a file.

    Raises:
        ValueError: it is no YAML, a key is given twice, or the text stands for more than it may.
    """
    try:
        reader = loader(text)
        try:
            root = reader.get_single_node()
            if root is None:
                return None
            _check_size(root)
            return reader.construct_document(root)
        finally:
            reader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(f"not readable as YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:  # a tag such as !!timestamp on a word
        raise ValueError(f"not readable as YAML: {type(error).__name__}: {error}") from error


_TOO_DEEP = f"not readable as YAML: more than {DEEPEST} lists and mappings are inside each other"


def _check_size(root: yaml.Node) -> None:
    """Refuse a tree that is deep, large, or contains itself, before anything is built from it."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node, depth: int) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1
        key = id(node)
        if key in open_nodes:
            raise ValueError("not readable as YAML: an alias stands for something that contains it")
        if depth > DEEPEST:
            raise ValueError(_TOO_DEEP)
        if key not in sizes:
            open_nodes.add(key)
            pairs = isinstance(node, yaml.MappingNode)
            parts = [part for pair in node.value for part in pair] if pairs else node.value
            sizes[key] = 1 + sum(size(part, depth + 1) for part in parts)
            open_nodes.discard(key)
        if sizes[key] > MOST_NODES:
            raise ValueError(f"not readable as YAML: it stands for more than {MOST_NODES} values")
        return sizes[key]

    size(root, 1)
