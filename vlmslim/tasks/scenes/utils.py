"""Functions that the task files of this folder name."""


def images(doc: dict) -> list:
    """Return the picture of a question."""
    return [doc["image"].convert("RGB")]


def normalise(text: str) -> str:
    """Write a text in lower case with single spaces and no full stop at its end."""
    return " ".join(text.lower().split()).rstrip(".")


def score(doc: dict, results: list[str]) -> dict:
    """Score 1 if the answer is the expected one, without regard to case, spaces and a full stop; else 0."""
    return {"acc": float(normalise(results[0]) == normalise(doc["answer"]))}
