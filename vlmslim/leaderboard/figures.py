"""The leaderboard as Plotly figures, for notebooks and experiment trackers; the page draws its own."""

from typing import TYPE_CHECKING

from vlmslim.leaderboard.axes import Axis, front
from vlmslim.leaderboard.board import Leaderboard

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def scatter(board: Leaderboard, cost: Axis, quality: Axis) -> "Figure":
    """Draw the rows by cost and quality, one colour for each budget, with a line through the Pareto front.

    Args:
        board: the leaderboard.
        cost: one of `cost_axes(board)`.
        quality: one of `quality_axes(board)`.

    Raises:
        ModuleNotFoundError: plotly is not installed.
    """
    from plotly.graph_objects import Figure, Scatter

    placed = [
        (row, x.value, y.value, best)
        for row, x, y, best in zip(board.rows, cost.values, quality.values, front(cost, quality), strict=True)
        if x is not None and y is not None
    ]
    best = sorted((x, y) for _, x, y, on_front in placed if on_front)
    figure = Figure(layout={"xaxis_title": cost.name, "yaxis_title": quality.name, "legend_title": "budget"})
    figure.add_trace(Scatter(x=[x for x, _ in best], y=[y for _, y in best], mode="lines", name="front"))
    for budget in dict.fromkeys(row.budget_name for row, *_ in placed):
        own = [(row.label, x, y) for row, x, y, _ in placed if row.budget_name == budget]
        labels, xs, ys = zip(*own, strict=True)
        figure.add_trace(Scatter(x=xs, y=ys, text=[_plain(label) for label in labels], mode="markers", name=budget))
    return figure


def _plain(text: str) -> str:
    """Escape what Plotly would read as a tag."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
