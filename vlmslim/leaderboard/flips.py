"""Questions that compression flipped, chosen for pictures."""

from itertools import zip_longest

from vlmslim.leaderboard.board import UNPATCHED, Leaderboard
from vlmslim.leaderboard.questions import Questions


def flipped(board: Leaderboard, most: int) -> dict[str, list[int]]:
    """Choose questions that some row lost or won against the unpatched model, of every row and task in turn.

    Lost questions come first. Where questions have no scores of their own, another answer is a flip.

    Args:
        board: the leaderboard.
        most: questions to choose, of all tasks together.

    Returns:
        task -> the numbers of its questions (`doc_id`), in ascending order.

    Raises:
        ConfigError: as `Leaderboard.questions`.
    """
    queues = [
        [(questions.task, number) for number in _flips(board, questions, label)]
        for questions in board.questions()
        for label in questions.answers
        if UNPATCHED in questions.answers and label != UNPATCHED
    ]
    in_turn = (one for round in zip_longest(*queues) for one in round if one is not None)
    chosen: dict[str, list[int]] = {}
    for task, number in list(dict.fromkeys(in_turn))[:most]:
        chosen.setdefault(task, []).append(number)
    return {task: sorted(numbers) for task, numbers in chosen.items()}


def _flips(board: Leaderboard, questions: Questions, label: str) -> list[int]:
    """List the questions that a row lost, and then those that it won."""
    sign = 1 if board.metrics[questions.task][1] else -1
    lost: list[int] = []
    won: list[int] = []
    for i, number in enumerate(questions.ids):
        ours, theirs = questions.scores[label][i], questions.scores[UNPATCHED][i]
        if ours is None or theirs is None:
            if questions.answers[label][i] != questions.answers[UNPATCHED][i]:
                lost.append(number)
        elif ours != theirs:
            (lost if sign * (ours - theirs) < 0 else won).append(number)
    return lost + won
