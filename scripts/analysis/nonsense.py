"""Seeded nonsense: values, bytes and words that few options and files can be; and an exact comparison of values."""

import json
import math
import random
from collections.abc import Iterator
from typing import Any


def value(rng: random.Random) -> Any:
    """Draw a value that JSON and YAML can hold, and that few keys can have."""
    return rng.choice(
        [
            *(None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**400, -(10**400)),
            *(-0.5, 0.0, 0.3, 1.0, 1e308, 5e-324, math.nan, math.inf, -math.inf),
            *("", " ", "no", "off", "None", "nan", "1e9", "-1", "x" * 300, "..", "../../x", "/", "a\0b", "=1+1", "\n"),
            *("\u202e", "\ud7ff", "bundled/nothing", "nobody.py:X", "[", "{", "&a", "*a", "!x", "%", "𝟙"),
            *([], [[]], [None], [1, "a", None], {}, {"a": 1}, {"": {}}, [{"method": "none"}] * 2),
            json.loads("[" * 60 + "]" * 60),
        ]
    )


_PIECES = [b"\0", b"\t", b"\xff\xfe", b"9" * 5000, b"[" * 3000, b"&a ", b"*a", b"!!python/name:os.system "]


def spoil_bytes(rng: random.Random, data: bytes) -> bytes:
    """Change a few bytes of a file, cut it, or write it in another encoding."""
    spot, other = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    low, high = sorted((spot, other))
    match rng.randrange(9):
        case 0:
            return data[:spot]
        case 1:
            return data[spot:]
        case 2:
            return data[:low] + data[high:]
        case 3:
            return data[:high] + data[low:]
        case 4:
            return data[:spot] + rng.randbytes(rng.randint(1, 8)) + data[spot + 8 :]
        case 5:
            return data[:spot] + rng.choice(_PIECES) + data[spot:]
        case 6:
            place = min(spot, len(data) - 1)
            return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
        case 7:
            return data.decode("utf-8", "replace").encode(rng.choice(["utf-16", "utf-32", "utf-8-sig"]))
    return rng.choice([b"", b"\0" * 100, b"{}", b"[]", b"null", b"0", b'"x"', rng.randbytes(50)])


def places(data: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the paths of all values inside dictionaries and lists."""
    yield path
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, part in pairs:
        yield from places(part, (*path, key))


def spoil_value(rng: random.Random, data: Any) -> tuple[Any, tuple]:
    """Replace a value somewhere inside, delete it, or add one with an unknown key; return the place too."""
    data = json.loads(json.dumps(data))
    path = rng.choice([*places(data)])
    if not path:
        return value(rng), path
    parent = data
    for key in path[:-1]:
        parent = parent[key]
    kind = rng.randrange(6)
    if kind == 0:
        del parent[path[-1]]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice(["x", "", "Keep", "methods ", "output_"])] = value(rng)
    else:
        parent[path[-1]] = value(rng)
    return data, path


def odd(rng: random.Random) -> str:
    """Draw a word that few arguments can be."""
    drawn = value(rng)
    return drawn if isinstance(drawn, str) and rng.random() < 0.5 else str(drawn)[:400]


def same(a: Any, b: Any) -> bool:
    """Compare two values with their types, in lists too."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a and b != b)


def leaves(data: Any) -> Iterator[Any]:
    """Yield all values that are no dictionaries and no lists."""
    parts = data.values() if isinstance(data, dict) else data if isinstance(data, list | tuple) else None
    if parts is None:
        yield data
    else:
        for part in parts:
            yield from leaves(part)
