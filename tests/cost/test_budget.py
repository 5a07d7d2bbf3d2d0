"""Equal budgets: the solved option meets the cost on the prompts' receipt, or an error names the nearest cost."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from evaluation_doubles import write_config
from hypothesis import given
from hypothesis import strategies as st
from prompts import Clip, Picture, batch, words
from tiny import BOS, DEPTH, tiny

import vlmslim
from vlmslim.compressor import Compressed, Compressor
from vlmslim.cost.budget import BudgetError, Solver, search_nearest, solve
from vlmslim.engine.families import kv_cache
from vlmslim.methods.divprune import DivPrune
from vlmslim.methods.drop_visual import DropVisual
from vlmslim.methods.fastv import FastV

ROWS = [
    [BOS, Picture(0, (60, 30)), *words(0, 5)],
    [BOS, *words(1, 4), Picture(1, (32, 64)), *words(2, 9)],
    [BOS, *words(4, 2), Picture(2, (60, 60)), *words(5, 3)],
    [BOS, Picture(3, (32, 20)), *words(6, 2), Picture(4, (64, 64)), *words(7, 4)],
    [BOS, *words(3, 7)],  # no image: it counts for nothing
]


def prompts(model, rows=ROWS) -> list[dict]:
    return [batch(model, [row], padding="none") for row in rows]


def cost(model, inputs, method, **options) -> dict[str, float]:
    """The cost of a method, counted from the lengths of its KV cache, without the package's own formulas."""
    layers = model.model.language_model.layers
    text = model.config.get_text_config()
    q = text.num_attention_heads * layers[0].self_attn.head_dim
    k = text.num_key_value_heads * layers[0].self_attn.head_dim
    matrices = text.hidden_size * (2 * q + 2 * k + 3 * text.intermediate_size)
    lengths, whole, visual = [0] * len(layers), 0, 0
    special = [model.config.image_token_id, getattr(model.config, "video_token_id", -1)]
    rows = [x for x in inputs if torch.isin(x["input_ids"], torch.tensor(special)).any()]
    with vlmslim.patch(model, method, **options) as slim:
        for x in rows:
            out = model(**x)
            own = [len(layer.keys[0, 0]) for layer in kv_cache(out).layers]
            lengths = [a + b for a, b in zip(lengths, own, strict=True)]
            placeholder = torch.isin(x["input_ids"], torch.tensor(special)).sum().item()
            whole += x["input_ids"].shape[1]
            visual += sum(own) / len(own) - (x["input_ids"].shape[1] - placeholder)
        images = slim.receipt.summary()["images"]

    def flops(tokens):
        return sum(n * matrices + 2 * n * n * q for n in tokens)

    count = len(rows)
    return {
        "equivalent_tokens": visual / images,
        "flops_ratio": flops([n / count for n in lengths]) / flops([whole / count] * len(layers)),
    }


METHODS = {
    "random": {},
    "uniform": {},
    "pool": {},
    "divprune": {},
    "divprune-rows": {"newline": "rows"},
    "fastv": {"layer": 1},
    "todre": {},
    "aim": {},
    "globalcom2": {},
    "tokencorr": {},
}


@pytest.mark.parametrize("currency", ["equivalent_tokens", "flops_ratio"])
def test_every_method_costs_what_another_costs(family, currency):
    """All of them meet the cost of the same method at a `keep` that every grid of counts allows."""
    model = tiny(family)
    inputs = prompts(model)
    solver = Solver(model, inputs)
    for label, options in METHODS.items():
        name = label.split("-")[0]
        given = options | {"keep": 9 if family in ("llava", "siglip") else 0.4321}
        target = cost(model, inputs, name, **given)[currency]
        solved = solver.solve({"method": name} | options, **{currency: target})
        assert solved.achieved == pytest.approx(target, rel=0.02), label
        assert cost(model, inputs, list(solved.stages))[currency] == pytest.approx(solved.achieved, rel=1e-9), label
        assert solved.option == "keep"
        if family in ("llava", "siglip"):
            assert solved.value == 9, label
        else:
            assert isinstance(solved.value, float), label


def test_counts_for_images_of_one_size_are_exact():
    model = tiny("llava")
    solved = solve(model, "divprune", prompts(model), equivalent_tokens=6)
    assert solved.stages == ({"method": "divprune", "keep": 6},)
    assert (solved.achieved, solved.prompts) == (6, 4)
    fastv = solve(model, "fastv", prompts(model), equivalent_tokens=(16 + 3 * 4) / 4, layer=1)
    assert fastv.stages == ({"method": "fastv", "layer": 1, "keep": 4},)


def test_a_fraction_meets_the_budget_on_average_over_sizes():
    model = tiny("next")
    inputs = prompts(model)
    keep = solve(model, "random", inputs, equivalent_tokens=20).value
    with vlmslim.patch(model, "random", keep=keep) as slim:
        for x in inputs:
            model(**x)
    assert slim.receipt.summary()["kept"] == pytest.approx(20, rel=0.02)


def test_a_budget_of_time_is_solved_with_the_clock_of_the_machine():
    """The clock runs by hand here: a third of the time is fixed, the rest grows with the tokens."""
    model, clock = tiny("llava"), []

    def time(stages):
        (stage,) = stages
        clock.append(stage["keep"])
        return 0.34 + 0.66 * stage["keep"] / 16 * (1 + 0.01 * (-1) ** len(clock))  # and is never the same twice

    solver = Solver(model, prompts(model), time=time)
    solved = solver.solve("divprune", ttft_ratio=0.67)
    assert (solved.value, solved.target) == (8, {"ttft_ratio": 0.67}) and len(clock) <= 12
    assert solved.achieved == pytest.approx(0.67, rel=0.05)
    with pytest.raises(BudgetError, match="cannot cost ttft_ratio=0.3 to within 5%: the nearest is keep=1 with 0.38"):
        solver.solve("divprune", ttft_ratio=0.3)


def test_the_time_of_a_method_is_measured_over_the_unpatched_models(monkeypatch):
    model = tiny("llava")

    def timed(model, attach, prompts, new_tokens, repeats):
        seconds = {}
        for name, attached in attach.items():
            with attached() as slim:
                seconds[name] = [SimpleNamespace(ttft_ms=20.0 if slim is None else 5.0, decode_ms=1.0)] * len(prompts)
        return seconds

    monkeypatch.setattr("vlmslim.cost.budget.measure_together", timed)
    solved = Solver(model, prompts(model)).solve("uniform", ttft_ratio=0.25)
    assert solved.achieved == 0.25


@pytest.mark.parametrize("mean", [8, 0.4])
@pytest.mark.parametrize("family", ["llava", "next"])
def test_budgets_of_each_images_own_meet_their_mean(family, mean):
    model = tiny(family)
    inputs = prompts(model)
    solved = solve(model, "random", inputs, auto=mean)
    assert solved.target == {"auto": mean} and solved.option == "keep" and json.dumps(solved.record())
    with vlmslim.patch(model, list(solved.stages)) as slim:
        kept, whole = [], []
        for x in inputs:
            model(**x)
            if "pixel_values" in x:
                images = [image for row in slim.receipt.last.images for image in row]
                kept += [image.kept for image in images]
                whole += [image.tokens for image in images]
    wanted = mean if isinstance(mean, int) else sum(round(mean * n) for n in whole) / len(whole)
    assert sum(kept) / len(kept) == pytest.approx(wanted, rel=0.02, abs=0.5)


def test_videos():
    model = tiny("onevision")
    inputs = prompts(model, [[BOS, Clip(0, 3), *words(0, 4)], [BOS, Clip(1, 8), *words(1, 4)]])
    solved = solve(model, "uniform", inputs, equivalent_tokens=7)
    assert cost(model, inputs, list(solved.stages))["equivalent_tokens"] == pytest.approx(7, rel=0.02)


def test_the_solved_option_is_the_first_that_is_not_given():
    model = tiny("llava")
    inputs = prompts(model)
    target = (16 * 3 + 4) / 4
    assert solve(model, {"method": "fastv", "keep": 4}, inputs, equivalent_tokens=target).record() == {
        "option": "layer",
        "value": 3,
        "target": {"equivalent_tokens": target},
        "achieved": target,
        "prompts": 4,
    }
    assert solve(model, {"method": "drop_visual", "tau": None}, inputs, equivalent_tokens=8).value == 2
    stages = [{"method": "divprune"}, {"method": "drop_visual", "layer": 0.5, "tau": None}]
    assert solve(model, stages, inputs, equivalent_tokens=3).stages[0] == {"method": "divprune", "keep": 6}
    stages = [{"method": "divprune", "keep": 6}, {"method": "drop_visual", "tau": None}]
    assert solve(model, stages, inputs, equivalent_tokens=3).stages[1]["layer"] == 2


def test_values_too_small_for_another_stage_are_skipped():
    model = tiny("llava")
    inputs = prompts(model)
    stages = [{"method": "divprune"}, {"method": "fastv", "keep": 6, "layer": 2}]
    assert solve(model, stages, inputs, equivalent_tokens=8).value == 10
    with pytest.raises(BudgetError, match=r"divprune\+fastv cannot .* nearest is keep=6 with 6"):
        solve(model, stages, inputs, equivalent_tokens=3)


def test_method_objects():
    model = tiny("llava")
    inputs = prompts(model)
    first, second = solve(model, [DivPrune(), DropVisual(2, None)], inputs, equivalent_tokens=4).stages
    assert (first, second) == (DivPrune(keep=8), DropVisual(2, None))
    assert solve(model, FastV(3, layer=1), inputs, equivalent_tokens=7).stages == (FastV(4, layer=1),)


def test_aim_solves_its_schedule_where_the_merging_is_given():
    model = tiny("llava")
    inputs = prompts(model)
    target = cost(model, inputs, "aim", keep=12, start=1, stop=3)["equivalent_tokens"]
    solved = solve(model, "aim", inputs, equivalent_tokens=target, keep=12, start=1)
    assert (solved.option, solved.value) == ("stop", 3)


@dataclass
class Secretive(Compressor):
    """Keeps a third of what it is asked for, without saying so in `visual_tokens`."""

    keep: float = 0.5

    def compress(self, image):
        return Compressed(image.features[: max(1, round(len(image.features) * self.keep / 3))])


def test_a_method_that_decides_by_itself_is_measured():
    model = tiny("next")
    inputs = prompts(model)
    solved = solve(model, Secretive(), inputs, equivalent_tokens=8)
    assert cost(model, inputs, list(solved.stages))["equivalent_tokens"] == pytest.approx(8, rel=0.02)
    assert solved.value == pytest.approx(3 * solve(model, DivPrune(), inputs, equivalent_tokens=8).value, rel=0.05)


@dataclass
class Squares(Compressor):
    """Refuses most counts."""

    keep: int = 4

    def __post_init__(self):
        if self.keep not in (1, 4, 9, 16):
            raise ValueError("squares only")

    def compress(self, image):
        return Compressed(image.features[: self.keep])


def test_counts_that_a_method_refuses_are_skipped():
    model = tiny("llava")
    inputs = prompts(model)
    assert solve(model, Squares(), inputs, equivalent_tokens=9).value == 9
    with pytest.raises(BudgetError, match="Squares cannot .* nearest is keep=9 with 9"):
        solve(model, Squares(), inputs, equivalent_tokens=10)


@pytest.mark.parametrize(
    "method, target, message",
    [
        ({"method": "fastv"}, {"equivalent_tokens": 2}, "fastv cannot cost equivalent_tokens=2 .*keep=1 with 8.5"),
        ({"method": "divprune"}, {"equivalent_tokens": 20}, "divprune .* nearest is keep=16 with 16"),
        ({"method": "divprune"}, {"equivalent_tokens": 5.5}, "to within 2%: the nearest is keep=5 with 5"),
        (
            {"method": "drop_visual", "tau": None},
            {"equivalent_tokens": 10},
            "nearest is layer=2 with 8|layer=3 with 12",
        ),
        (
            {"method": "drop_visual", "tau": 0.0},
            {"equivalent_tokens": 8},
            "drop_visual cannot cost equivalent_tokens=8 .* with 16",
        ),
    ],
)
def test_a_cost_that_cannot_be_met_is_refused_with_the_nearest(method, target, message):
    model = tiny("llava")
    with pytest.raises(BudgetError, match=message):
        solve(model, method, prompts(model), **target)
    assert not hasattr(model, "_vlmslim")


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("divprune", {}, "a budget is one of equivalent_tokens=64, flops_ratio=0.15, ttft_ratio=0.5 and auto=64"),
        ("divprune", {"equivalent_tokens": 4, "flops_ratio": 0.5}, "a budget is one of"),
        ("divprune", {"equivalent_tokens": 0}, "equivalent_tokens=0: give a positive number"),
        ("divprune", {"equivalent_tokens": float("nan")}, "give a positive number"),
        ("divprune", {"flops_ratio": 1.5}, "lies in .0, 1."),
        ("divprune", {"equivalent_tokens": 4, "keep": 3}, "nothing is left to solve; leave out the option"),
        ("none", {"equivalent_tokens": 4}, "nothing is left to solve"),
        ("divprun", {"equivalent_tokens": 4}, "Did you mean 'divprune'"),
        ("divprune", {"equivalent_tokens": 4, "ordr": "raster"}, "Did you mean 'order'"),
    ],
)
def test_wrong_requests(method, options, message):
    model = tiny("llava")
    with pytest.raises(ValueError, match=message):
        solve(model, method, prompts(model), **options)


def test_options_go_with_a_name():
    model = tiny("llava")
    with pytest.raises(ValueError, match="options go with a method's name only; .'layer'. came with"):
        solve(model, FastV(4), prompts(model), equivalent_tokens=7, layer=1)
    assert Solver(model, prompts(model)).solve("divprune", equivalent_tokens=7).value == 7


def test_prompts_must_have_images_one_row_at_a_time():
    model = tiny("llava")
    with pytest.raises(ValueError, match="no sample prompt has an image"):
        solve(model, "divprune", prompts(model, ROWS[-1:]), equivalent_tokens=4)
    with pytest.raises(ValueError, match="give inputs of one row"):
        solve(model, "divprune", [batch(model, ROWS[:2])], equivalent_tokens=4)


def test_the_solution_is_the_same_twice_and_json():
    model = tiny("next")
    once, twice = (solve(model, "todre", prompts(model), flops_ratio=0.5) for _ in range(2))
    assert once == twice
    assert json.loads(json.dumps(once.record())) == once.record()


@given(st.lists(st.floats(0, 100), min_size=1, max_size=60), st.floats(0.1, 120), st.integers(0, 59))
def test_nearest_finds_the_nearest(costs, target, start):
    costs.sort()
    index, found = search_nearest(costs.__getitem__, len(costs), target, start % len(costs))
    assert found == costs[index]
    assert abs(found - target) == min(abs(c - target) for c in costs)


@given(st.integers(1, 10**6), st.floats(1e-3, 1))
def test_the_search_keeps_to_its_calls(size, at):
    calls = []

    def step(i):
        calls.append(i)
        return float(i > at * size)

    search_nearest(step, size, 0.5, max_calls=5)
    assert len(calls) <= 5
    assert len(set(calls)) == len(calls)


def test_a_fraction_of_the_depth_is_resolved_as_in_the_engine():
    model = tiny("llava")
    inputs = prompts(model)
    for layer in (0.3, 0.5, 0.6, 0.9):
        stage = FastV(4, layer=layer)
        planned = sum(stage.visual_tokens(16, DEPTH)) / DEPTH
        assert cost(model, inputs, stage)["equivalent_tokens"] == planned


@pytest.mark.slow
def test_a_run_at_equal_cost(tmp_path):
    """The bundled checkpoint in lmms-eval: the receipt of every cell shows the cost that the budget asked for."""
    pytest.importorskip("lmms_eval", reason="the extra vlmslim[eval] is not installed")
    from vlmslim.evaluation.config import load_config
    from vlmslim.evaluation.errors import ConfigError
    from vlmslim.evaluation.run import run
    from vlmslim.evaluation.store import Store

    settings = {
        "model": {"pretrained": "bundled/tiny-llava", "device": "cpu"},
        "tasks": ["scenes_count"],
        "methods": ["divprune", "fastv", "aim", "todre"],
        "limit": 3,
        "timing": None,
    }
    path = write_config(tmp_path, **settings, budgets=[{"equivalent_tokens": 48}, {"flops_ratio": 0.5}])
    board = run(load_config(path))
    rows = {row.label: row for row in board.rows}
    for method in ("random", "divprune", "fastv", "aim", "todre"):
        assert rows[f"{method}-equivalent_tokens=48"].cost.equivalent == pytest.approx(48, rel=0.02)
        assert rows[f"{method}-flops_ratio=0.5"].flops_ratio == pytest.approx(0.5, rel=0.02)
    cell = Store(tmp_path / "out").cell("fastv-equivalent_tokens=48", "scenes_count")
    assert cell["stages"][0]["keep"] == cell["budget"]["value"] == 16
    assert cell["budget"]["spent"] == cell["budget"]["achieved"] == 48
    saved = (tmp_path / "out" / "leaderboard.json").read_bytes()
    run(load_config(path))
    assert (tmp_path / "out" / "leaderboard.json").read_bytes() == saved

    write_config(tmp_path, **settings, budgets=[{"equivalent_tokens": 30}])
    with pytest.raises(ConfigError, match="fastv cannot cost equivalent_tokens=30 .* nearest is keep=1 with 36.75"):
        run(load_config(path))
