"""Functions that the task files of this folder name."""


def images(doc: dict) -> list:
    """The picture of a question."""
    return [doc["image"].convert("RGB")]


def normalise(text: str) -> str:
    """Lower case, single blanks, no full stop at the end."""
    return " ".join(text.lower().split()).rstrip(".")


def score(doc: dict, results: list[str]) -> dict:
    """1 if the answer is the expected one, up to case, blanks and a full stop; else 0."""
    return {"acc": float(normalise(results[0]) == normalise(doc["answer"]))}
