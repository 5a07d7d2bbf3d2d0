"""From the generation arguments of a task to those of `generate()`, and from its output to an answer."""

from functools import cache
from typing import Any

from loguru import logger

SAMPLING = ("temperature", "top_p", "top_k")
PASSED_ON = ("num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "min_new_tokens")


def generation_options(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments for `generate()`, and the strings to stop at.

    Generation is greedy, unless the task asks for a temperature. Arguments without a meaning here are named in a
    warning.

    Args:
        given: `generation_kwargs` of a task.
    """
    given = {name: value for name, value in given.items() if value is not None}
    until = given.pop("until", [])
    tokens = given.pop("max_new_tokens", given.pop("max_gen_toks", 1024))
    sampling = {name: given.pop(name, None) for name in SAMPLING}
    sample = given.pop("do_sample", False)
    if sampling["temperature"] is not None:
        sample = sampling["temperature"] > 0
    options = {name: given.pop(name) for name in PASSED_ON if name in given}
    for name in given:
        _warn_ignored(name)
    if not sample:
        sampling = dict.fromkeys(SAMPLING)  # None also silences the generation config of the checkpoint
    else:
        sampling = {name: value for name, value in sampling.items() if value is not None}
    options |= {"max_new_tokens": int(tokens), "do_sample": bool(sample), **sampling}
    return options, [until] if isinstance(until, str) else until


@cache
def _warn_ignored(name: str) -> None:
    logger.warning("the generation argument {!r} means nothing to this model and is ignored", name)


def cut_at(text: str, until: list[str]) -> str:
    """Return `text` up to the first of the strings `until`."""
    return text[: min((place for stop in until if (place := text.find(stop)) >= 0), default=len(text))]
