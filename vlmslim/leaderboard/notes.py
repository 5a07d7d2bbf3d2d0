"""The notes under the tables: what a reader must know to use the numbers."""

import re
from dataclasses import asdict

from vlmslim.evaluation.effect import acted_on
from vlmslim.leaderboard.board import Leaderboard
from vlmslim.leaderboard.comparison import LEVEL, SWAPS
from vlmslim.leaderboard.costs import front_changes, order_changes, spans
from vlmslim.leaderboard.tables import IDLE, STAR

#: Baselines, and what is known by them.
BASELINES = {
    "random": "A useful method beats it.",
    "uniform": "A useful method beats it.",
    "blind": "Without it nothing tells how much of a score the picture adds (vision-retained).",
    "downsample": "A useful method beats it, above all on the questions that it gets wrong (hard subset).",
}


def notes(board: Leaderboard) -> list[str]:
    """Write all notes, one paragraph each, as plain text."""
    return [
        _scores(board),
        protocol(board),
        *_tests(board),
        *_vision(board),
        *_hard(board),
        *_groups(board),
        *_solved(board),
        *_activity(board),
        _costs(board),
        *_equal_cost(board),
        *_times(board),
        *_baselines(board),
        _origin(board),
        _verified(board),
    ]


def _scores(board: Leaderboard) -> str:
    limit = board.facts["limit"]
    names = {board.metrics[task][0] for task in board.tasks}
    metrics = ", ".join(names if len(names) == 1 else [f"{task} = {board.metrics[task][0]}" for task in board.tasks])
    in_per_cent = [task for task in board.tasks if board.scale(task) == 100]
    which = "all tasks" if len(in_per_cent) == len(board.tasks) else ", ".join(in_per_cent) or "no task"
    asked = "all questions" if limit is None else f"the first {limit} questions"
    return (
        f"Metric: {metrics}, in per cent for {which}, on {asked} of each task. The number after ± is half of the 95 % "
        "confidence interval; brackets hold both ends of an interval that is not symmetric. Within a budget, the best "
        "value is bold, and a value that is not significantly worse is italic. The rank follows "
        f"{_RANKED_BY[board.ranked_by]}: it is 1 + the number of methods that are significantly better. Two methods "
        "with different ranks need not differ significantly."
    )


_RANKED_BY = {
    "unpatched": "the average",
    "vision-retained": "the vision-retained score, as do the differences of averages and the Pareto front",
    "hard": "the hard subset, as do the differences of averages and the Pareto front",
}


#: What the parts of a protocol do, for a reader who does not know their names.
_ASPECTS = {
    "pad": "padded to squares",
    "crop": "cut to squares",
    "anyres": "cut into tiles",
    "native": "as the checkpoint's processor fits them",
}


def protocol(board: Leaderboard) -> str:
    """Say what moves numbers besides the methods: pictures, prompts, questions, batches and arithmetic."""
    facts, told = board.facts, board.facts["protocol"]
    if told is None:
        name = "not recorded"
    else:
        name = (
            f"{told['protocol']} (pictures {_ASPECTS[told['image_aspect_ratio']]}, conversation {told['conversation']})"
        )
        if told.get("share_prefix"):
            name += ", the beginning of prompts prefilled once, for rows that act before the language model"
    questions = []
    for task in board.tasks:
        asked = facts["asked"].get(task, {})
        count = max((row.scores[task].questions for row in board.rows if task in row.scores), default=0)
        parts = [
            board.metrics[task][0],
            f"{count} questions" + (f" of {split}" if (split := asked.get("split")) else ""),
        ]
        if (ocr := asked.get("ocr")) is not None:
            parts.append("with OCR hints" if ocr else "without OCR hints")
        questions.append(f"{task}: {', '.join(parts)}")
    how = f"Protocol: {name}; batch size {facts['batch_size']}; {', '.join(facts['backends'])}"
    return ". ".join([how, *(["; ".join(questions)] if questions else [])]) + "."


def _tests(board: Leaderboard) -> list[str]:
    """Say how differences are tested, and which scores are tested at all."""
    comparison = board.comparison
    if not comparison.pairs and not comparison.stability:
        return []
    lines = [
        f"Differences are paired, because all rows answered the same questions. {STAR} marks a significant difference "
        f"(p < {LEVEL:g}). The test is McNemar's mid-p test where every question is right or wrong and has its own "
        "picture. Elsewhere it is a permutation test that swaps all scores of a picture, with at least "
        f"{SWAPS} swaps. Holm's method corrects the p values for all pairs of a budget within a column, pairs with the "
        "unpatched model included. Right-or-wrong scores have Wilson's intervals, for the effective number of "
        "questions. Other scores, averages and differences have Student's intervals over pictures. A p value with < is "
        "the smallest that so many random swaps can tell. "
        "Loyalty is the share of answers that equal the unpatched model's. Lost and won are the shares of "
        "questions whose score fell and rose."
    ]
    tested_otherwise = [task for task in board.not_question_means if task not in comparison.untested]
    if board.not_question_means and comparison.averaged:
        lines.append(
            "Ranks, marks, differences and p values of the average use the questions' own scores of "
            f"{', '.join(comparison.averaged)}. The average in the table contains other scores too, and may order the "
            "methods differently."
        )
    if tested_otherwise:
        lines.append(
            f"The score is not the mean of the questions' own scores for {', '.join(tested_otherwise)}. There, tests "
            "compare the questions' own scores."
        )
    if comparison.untested:
        lines.append(f"Not tested, because single questions have no scores: {', '.join(comparison.untested)}.")
    return lines


def _vision(board: Leaderboard) -> list[str]:
    """Say what the vision-retained score is made of, and which tasks it leaves out."""
    if not any(row.vision for row in board.rows):
        return []
    left_out = [task for task in board.tasks if task not in board.vision_tasks]
    why = (
        f"Left out, because the picture adds too little to them: {', '.join(left_out)}."
        if left_out
        else "No task is left out."
    )
    return [
        "Vision-retained is (score - blind) / (unpatched - blind), averaged over the tasks to which the picture adds a "
        f"tenth of the score or more, beyond doubt: {', '.join(board.vision_tasks)}. {why}"
    ]


def _hard(board: Leaderboard) -> list[str]:
    """Say how large the hard subsets are."""
    told = []
    asked = {task: max(r.scores[task].questions for r in board.rows if task in r.scores) for task in board.tasks}
    for row in board.rows:
        if (sizes := board.comparison.hard_questions.get(row.label)) is not None:
            each = ", ".join(f"{task} {count}" for task, count in sizes.items())
            told.append(f"{sum(sizes.values())} of {sum(asked[task] for task in sizes)} at {row.budget_name} ({each})")
    if not told:
        return []
    return [
        "The hard subset holds the questions that downsample, the shrunk picture, gets wrong at the same budget (a "
        f"score below one half): {'; '.join(told)}. Its score is relative to the unpatched model's on these questions."
    ]


def _groups(board: Leaderboard) -> list[str]:
    present = dict.fromkeys(board.groups.values())
    members = [f"{name}: {', '.join(t for t in board.tasks if board.groups[t] == name)}" for name in present]
    return [f"Task groups. {'; '.join(members)}."] if len(members) > 1 else []


def _solved(board: Leaderboard) -> list[str]:
    prompts = sorted({row.solved.solution["prompts"] for row in board.rows if row.solved is not None})
    if not prompts:
        return []
    return [
        f"Where the budget is a cost, one option was solved on {' or '.join(map(str, prompts))} sample prompts. "
        '"Spent" is the cost of the tasks in the same unit: mean (lowest–highest of the tasks).'
    ]


def _activity(board: Leaderboard) -> list[str]:
    """Say on how many prompts a stage acted, for each stage that decides itself and each that never acted."""
    stages = [(row.label, i, stage) for row in board.rows for i, stage in enumerate(row.activity, 1)]
    told = [(label, i, stage) for label, i, stage in stages if stage.decides or stage.never_acted]
    if not told:
        return []
    lines = ["Stages that decide themselves how many tokens they drop may drop none."]
    lines += [f"{label}: {acted_on(i, asdict(stage))}." for label, i, stage in told]
    if any(stage.never_acted for _, _, stage in told):
        lines.append(f"{IDLE} marks a row with a stage that never acted; its scores are those of the row without it.")
    return [" ".join(lines)]


def _costs(board: Leaderboard) -> str:
    facts = board.facts
    tower = facts["tower_flops"]  # None where it depends on the size of the picture
    tower = (
        "The vision tower comes on top" if tower is None else f"The vision tower adds {tower / 1e9:.2f} GFLOPs per crop"
    )
    return (
        f"An image has {facts['visual_tokens']:.1f} visual tokens before compression. Nominal tokens, as papers count "
        "them: those that the budget asks for, else those that enter the language model. Tokens kept: visual tokens of "
        "an image that enter the language model (fewest–most, where images differ) → that are left in its last layer. "
        "Equivalent tokens: visual tokens of a prompt, averaged over the decoder layers. Prefill FLOPs count the "
        "language model alone, with multiply-add = 2, three MLP matrices and full attention. "
        f"{tower}. The method's FLOPs are those of its own matrix products, "
        "with the parts of the model that it calls, such as the projector, counted on the first prompts of each task. "
        "A row is on the Pareto front of a cost if no row, at any budget, has a better average for at most that cost: "
        "nominal tokens, equivalent tokens, FLOPs of language model and method, or TTFT."
    )


def _equal_cost(board: Leaderboard) -> list[str]:
    """Say where rows of equal nominal budget cost differently, and where the order depends on what is counted."""
    told = [(group[0].budget_name, spans(group)) for group in board.budgets() if len(group) > 1]
    lines = [f"Rows at {budget} cost differently: {text}." for budget, text in told if text]
    if changes := front_changes(board.rows):
        lines.append(f"The Pareto front depends on the cost: {'; '.join(changes)}.")
    swaps = [f"{a} is ahead of {b} at {here}, and behind it at {there}" for a, b, here, there in order_changes(board)]
    if swaps:
        lines.append(f"The order of methods depends on the cost: {'; '.join(swaps)}.")
    return [" ".join(lines)] if lines else []


def _times(board: Leaderboard) -> list[str]:
    timing = board.facts["timing"]
    if not timing:
        return []
    machine = f", on {board.facts['timed_on']}" if board.facts.get("timed_on") else ""
    return [
        "TTFT is the time to first token, with image encoding and compression. Times are medians of "
        f"{timing['prompts']} prompts x {timing['repeats']} repetitions at batch size 1 with {timing['new_tokens']} "
        f"new tokens. All rows were timed interleaved, in one process{machine}. Parentheses hold the median ratio to "
        "the unpatched model. Selection is the time that the method took for a prompt of the evaluation, at the "
        "evaluation's batch size. KV cache is the size of a prompt's cache after prefill."
    ]


def _baselines(board: Leaderboard) -> list[str]:
    used = {stage["method"] for row in board.rows for stage in row.stages}
    missing = [name for name in BASELINES if name not in used]
    return [f"Missing baseline: {name}. {BASELINES[name]}" for name in missing]


def _origin(board: Leaderboard) -> str:
    facts = board.facts
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    commits, configs = (", ".join(map(_short, facts[name])) for name in ("git_commits", "config_hashes"))
    own = "".join(f"; {file} {_short(version)}" for file, version in facts["method_versions"].items())
    checkpoint = f" ({_short(facts['checkpoint'])})" if facts["checkpoint"] else ""
    return (
        f"{facts['model']}{checkpoint}; seed {facts['seed']}; {versions}; {'; '.join(facts['hardware'])}; "
        f"{'; '.join(facts['backends'])}; commit {commits}{own}; config {configs}; cells {facts['cells']}."
    )


def _verified(board: Leaderboard) -> str:
    """Say whether a sample of the questions was asked again, and what came out."""
    found = board.facts["verified"]
    if found is None:
        return "Not verified yet. vlmslim verify RUN asks a sample of the questions again, in other batches."
    return f"Verified, {found}."


def _short(hash: str) -> str:
    """Return the first digits of a hash, with the "+" that marks uncommitted changes; other texts stay as they are."""
    return re.sub(r"^([0-9a-f]{12})[0-9a-f]+", r"\1", hash)
