"""A check that every stage of a method acted. It reads receipts without torch, so that the leaderboard can use it."""

from collections.abc import Sequence


def check_effect(receipt: dict) -> None:
    """Refuse numbers that a stage had no part in.

    A stage may keep every visual token only if its budget says so, or if it decides itself; `abstentions` tells the
    user about the latter.

    Args:
        receipt: `Receipt.summary()`.

    Raises:
        RuntimeError: a stage acted on no prompt, or no image reached the model; the message names the stage.
    """
    stages = receipt["stages"]
    if not receipt["images"] and any(stage["name"] != "none" for stage in stages):
        raise RuntimeError("no image reached the model, so the method had nothing to do; take the task out")
    for number, stage in enumerate(stages, 1):
        if not (stage["acted"] or stage["keeps_all"] or stage["decides"]):
            raise RuntimeError(
                f"{acted_on(number, stage)}; it was not asked to keep everything, but {stage['tokens_in']:.1f} visual "
                f"tokens of a prompt went in and {stage['tokens_out']:.1f} came out"
            )


def abstentions(receipts: Sequence[dict]) -> list[str]:
    """Say on how many prompts the stages acted that decide themselves, where they kept every token of some prompts.

    Args:
        receipts: of one method on several tasks. Receipts of an older vlmslim do not list stages; they count nothing.
    """
    by_task = [receipt["stages"] for receipt in receipts if "stages" in receipt]
    said = []
    for number, stages in enumerate(zip(*by_task, strict=True), 1):
        acted, prompts = (sum(stage[name] for stage in stages) for name in ("acted", "prompts"))
        if any(stage["decides"] for stage in stages) and acted < prompts:
            said.append(acted_on(number, stages[0] | {"acted": acted, "prompts": prompts}))
    return said


def acted_on(number: int, stage: dict) -> str:
    """Say on how many prompts a stage acted: `stage 2 (drop_visual, before layer 6) acted on 0 of 700 prompts`."""
    where = _place(stage["layers"])
    return f"stage {number} ({stage['name']}, {where}) acted on {stage['acted']} of {stage['prompts']} prompts"


def _place(layers: Sequence[int]) -> str:
    """Say where a stage acts: `before layers 1..3`."""
    if not layers:
        return "before the language model"
    first, last = layers[0], layers[-1]
    if len(layers) > 2 and list(layers) == list(range(first, last + 1)):
        return f"before layers {first}..{last}"
    return f"before layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
