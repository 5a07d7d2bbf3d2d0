"""The YAML schema: what runs, in which order, and how mistakes are reported. And every file that ships."""

from pathlib import Path

import pytest
import yaml

from vlmslim.evaluation.config import load_config
from vlmslim.evaluation.errors import ConfigError

SHIPPED = sorted((Path(__file__).parents[2] / "eval_configs").glob("*.yaml"))
GOOD = {
    "model": {"pretrained": "somewhere"},
    "tasks": ["pope"],
    "methods": ["divprune"],
    "budgets": [64, 0.1],
    "baselines": ["random"],
    "output": "out",
}


@pytest.fixture
def load(tmp_path):
    def load(changes=None, **overrides):
        path = tmp_path / "config.yaml"
        path.write_text(changes if isinstance(changes, str) else yaml.safe_dump(GOOD | (changes or {})))
        return load_config(path, **overrides)

    return load


def labels(config) -> list[str]:
    return [v.label for v in config.variants()]


def test_methods_are_crossed_with_budgets(load):
    assert labels(load()) == ["none", "random-64", "random-0.1", "divprune-64", "divprune-0.1"]


def test_the_baselines_are_in_unless_told_otherwise(load):
    config = {name: value for name, value in GOOD.items() if name != "baselines"}
    rows = ["random-64", "random-0.1", "uniform-64", "uniform-0.1", "blind", "downsample-64", "downsample-0.1"]
    assert labels(load(yaml.safe_dump(config))) == ["none", *rows, "divprune-64", "divprune-0.1"]
    assert labels(load({"baselines": False})) == ["none", "divprune-64", "divprune-0.1"]
    assert labels(load({"baselines": []})) == ["none", "divprune-64", "divprune-0.1"]
    for number in (0, 0.0, 1, True):
        with pytest.raises(ConfigError, match="a list of methods, or false"):
            load({"baselines": number})


def test_the_unpatched_model_comes_first_and_once(load):
    assert labels(load({"methods": ["divprune", "none", "random"]})) == [
        "none",
        "divprune-64",
        "divprune-0.1",
        "random-64",
        "random-0.1",
    ]


def test_own_budgets_options_and_labels(load):
    methods = [
        {"method": "fastv", "keep": 16, "layer": 3},
        {"method": "divprune", "keep": [8, 4], "order": "selection", "label": "picked"},
    ]
    config = load({"methods": methods, "baselines": []})
    assert labels(config) == ["none", "fastv-16-layer=3", "picked-8", "picked-4"]
    assert config.variants()[1].stages == ({"method": "fastv", "keep": 16, "layer": 3},)
    assert config.variants()[2].budget == 8


def test_a_default_budget_is_used_where_none_is_given(load):
    assert labels(load({"budgets": [], "baselines": []})) == ["none", "divprune-0.098"]


def test_stages(load):
    stages = [{"method": "divprune", "keep": 64}, {"method": "fastv", "keep": 16}]
    config = load({"methods": [{"stages": stages}], "budgets": [], "baselines": ["random"]})
    assert labels(config) == ["none", "random-16", "divprune-64+fastv-16"]
    assert config.variants()[2].stages == tuple(stages)


def test_costs_are_budgets(load):
    config = load({"budgets": [64, {"equivalent_tokens": 64}, {"flops_ratio": 0.15}]})
    assert labels(config) == [
        "none",
        "random-64",
        "random-equivalent_tokens=64",
        "random-flops_ratio=0.15",
        "divprune-64",
        "divprune-equivalent_tokens=64",
        "divprune-flops_ratio=0.15",
    ]
    plain, cost = config.variants()[4:6]
    assert not plain.unsolved
    assert cost.unsolved
    assert (cost.stages, cost.budget) == (({"method": "divprune"},), {"equivalent_tokens": 64})
    solved = cost.solve([{"method": "divprune", "keep": 64}], {"option": "keep"})
    assert (solved.unsolved, solved.label, solved.stages[0]["keep"]) == (False, cost.label, 64)


def test_costs_of_one_method(load):
    methods = [
        {"method": "fastv", "layer": 3, "budget": {"equivalent_tokens": 70}},
        {"method": "fastv", "keep": 16, "budget": {"flops_ratio": 0.4}},
        {"method": "divprune", "budgets": [32, {"equivalent_tokens": 64.5}], "label": "mine"},
    ]
    rows = load({"methods": methods, "budgets": [], "baselines": []}).variants()
    assert [row.label for row in rows] == [
        "none",
        "fastv-layer=3-equivalent_tokens=70",
        "fastv-16-flops_ratio=0.4",
        "mine-32",
        "mine-equivalent_tokens=64.5",
    ]
    assert [row.budget for row in rows[1:]] == [
        {"equivalent_tokens": 70},
        {"flops_ratio": 0.4},
        32,
        {"equivalent_tokens": 64.5},
    ]
    assert rows[1].stages == ({"method": "fastv", "layer": 3},)


def test_costs_of_stages(load):
    stages = [{"method": "random"}, {"method": "drop_visual", "layer": 0.5}]
    entry = {"stages": stages, "budgets": [{"equivalent_tokens": 8}, {"equivalent_tokens": 4}]}
    rows = load({"methods": [entry], "budgets": [], "baselines": ["random"], "seed": 3}).variants()
    assert [row.label for row in rows[1:]] == [
        "random-equivalent_tokens=8",
        "random-equivalent_tokens=4",
        "random+drop_visual-layer=0.5-equivalent_tokens=8",
        "random+drop_visual-layer=0.5-equivalent_tokens=4",
    ]
    assert rows[3].stages == ({"method": "random", "seed": 3}, stages[1])


def test_costs_reach_methods_without_keep(load):
    cost = {"equivalent_tokens": 64}
    assert labels(load({"methods": ["drop_visual"], "budgets": [cost], "baselines": []})) == [
        "none",
        "drop_visual-equivalent_tokens=64",
    ]
    assert labels(load({"methods": ["drop_visual"], "budgets": [16, cost], "baselines": []})) == [
        "none",
        "drop_visual",
        "drop_visual-equivalent_tokens=64",
    ]


def test_the_seed_reaches_random_methods(load):
    config = load({"methods": ["random", {"method": "random", "keep": 3, "seed": 9}], "seed": 5, "budgets": [64]})
    seeds = [s["seed"] for v in config.variants() for s in v.stages if s["method"] == "random"]
    assert seeds == [5, 5, 9]  # the baseline at keep=3 with the run's seed, then those that are listed


def test_task_metrics(load):
    config = load({"tasks": ["gqa", {"task": "mme", "metric": "mme_perception_score"}]})
    assert [(t.task, t.metric) for t in config.tasks] == [("gqa", None), ("mme", "mme_perception_score")]


def test_overrides(load):
    config = load(limit=7, output=Path("elsewhere"), seed=None)
    assert (config.limit, config.output, config.seed) == (7, Path("elsewhere"), 0)


def test_what_makes_runs_comparable(load):
    base = load().shared()
    assert load({"methods": ["fastv"], "tasks": ["gqa"], "output": "b"}).shared() == base
    for change in (
        {"seed": 1},
        {"limit": 3},
        {"batch_size": 2},
        {"model": {"pretrained": "elsewhere"}},
        {"model": {"pretrained": "somewhere", "dtype": "float16"}},
    ):
        assert load(change).shared() != base


def laughs(depth):
    """Return a YAML of a few hundred bytes that stands for 9**depth words."""
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{i + 1}: &a{i + 1} [{','.join([f'*a{i}'] * 9)}]" for i in range(depth)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"budget": [3]}, "unknown key 'budget'. Did you mean 'budgets'?"),
        ({"model": {"pretrained": "x", "dtpye": "float32"}}, "model: unknown key 'dtpye'. Did you mean 'dtype'?"),
        ({"model": {"pretrained": "x", "dtype": "int8"}}, "model.dtype: Input should be 'auto'"),
        ({"model": {}}, "model.pretrained: Field required"),
        ({"tasks": []}, "tasks: List should have at least 1 item"),
        ({"model": {"pretrained": "x", "protocol": "paper"}}, "model.protocol: Input should be 'original' or 'hf'"),
        ({"model": {"pretrained": "x", "conversation": "vicuna"}}, "Did you mean 'vicuna_v1'?"),
        ({"tasks": [{"task": "a", "metrics": "b"}]}, "tasks.0: unknown key 'metrics'. Did you mean 'metric'?"),
        ({"timing": {"repeat": 3}}, "timing: unknown key 'repeat'. Did you mean 'repeats'?"),
        ({"methods": ["divprun"]}, "unknown method 'divprun'. Did you mean 'divprune'?"),
        ({"methods": [{"method": "fastv", "layers": 3}]}, "unknown option of fastv 'layers'. Did you mean 'layer'?"),
        ({"methods": [{"method": "fastv", "kep": 3}]}, "unknown option of fastv 'kep'. Did you mean 'keep'?"),
        ({"methods": [{"method": "fastv", "keep": True}]}, "methods.0.keep"),
        ({"methods": [{"method": "fastv", "keep": 0}]}, "at least one visual token"),
        ({"methods": [{"method": "fastv", "keep": 1.5}]}, "a share lies in (0, 1]"),
        ({"methods": ["fastv"], "budgets": []}, "fastv: how many tokens? Give 'keep' here, or 'budgets'"),
        ({"methods": [{"keep": 3}]}, "give either 'method' or 'stages'"),
        ({"methods": [{"stages": [{"keep": 3}]}]}, "'stages' is a list of entries such as"),
        ({"methods": [{"stages": [{"method": "fastv", "keep": 3}], "keep": 3}]}, "every stage carries its own"),
        ({"methods": ["divprune", {"method": "fastv", "keep": 64, "label": "divprune-64"}]}, "another 'label'"),
        ({"methods": [{"method": "fastv", "label": "../x"}]}, "methods.0.label"),
        ({"baselines": ["rndom"]}, "unknown method 'rndom'. Did you mean 'random'?"),
        ({"limit": 0}, "limit"),
        ({"budgets": [{"equivalent_token": 3}]}, "budgets.0: unknown key 'equivalent_token'. Did you mean"),
        (
            {"budgets": [{}]},
            "budgets.0: give one of {equivalent_tokens: 64}, {flops_ratio: 0.15}, {ttft_ratio: 0.5} and {auto",
        ),
        ({"budgets": [{"equivalent_tokens": 3, "flops_ratio": 0.1}]}, "budgets.0: give one of"),
        ({"budgets": [{"equivalent_tokens": 0}]}, "budgets.0.equivalent_tokens: Input should be greater than 0"),
        ({"budgets": [{"flops_ratio": 1.5}]}, "budgets.0.flops_ratio: Input should be less than or equal to 1"),
        ({"budgets": ["many"]}, "budgets.0"),
        ({"methods": [{"method": "fastv", "budget": 3, "budgets": [4]}]}, "give either 'budget' or 'budgets'"),
        (
            {"methods": [{"method": "fastv", "keep": 3, "budget": 4}]},
            "next to 'keep' or 'stages', 'budgets' lists costs",
        ),
        (
            {"methods": [{"method": "divprune", "keep": 3, "budget": {"flops_ratio": 0.1}}]},
            "divprune: nothing is left to solve; leave out the option that the budget decides",
        ),
        ({"methods": [{"method": "none", "budget": {"flops_ratio": 0.1}}]}, "none: nothing is left to solve"),
        ("just words", "a configuration is a mapping"),
        ("model: [", "not readable as YAML"),
        ({"tasks": ["count", {"task": "count", "metric": "acc"}]}, "tasks: listed twice: count"),
        ({"budgets": ["1e9"]}, "budgets.0: YAML reads 1e9 as text; write 1.0e+9"),
        ({"budgets": [{"equivalent_tokens": "2.5E2"}]}, "equivalent_tokens: YAML reads 2.5E2 as text; write 2.5e+2"),
        ({"methods": [{"method": "fastv", "keep": "1e-1"}]}, "methods.0.keep: YAML reads 1e-1 as text; write 1.0e-1"),
        (
            {"methods": ["drop_visual"], "budgets": []},
            "baselines: at which budget shall random run? No method here has one; give 'budgets', or 'baselines: false",
        ),
        ("seed: 1\nseed: 2\n", "the key 'seed' is given twice"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"seed": True}, "seed: Input should be a valid integer"),
        ({"seed": 2**32}, "seed: Input should be less than"),
        ({"limit": 10**4000}, "limit: "),
        ({"batch_size": "2"}, "batch_size: Input should be a valid integer"),
        ({"budgets": [10**4000]}, "budgets.0: "),
        ({"budgets": [float("nan")]}, "budgets.0: "),
        ({"methods": [{"method": "fastv", "keep": 4, "layer": 10**4000}]}, "layer="),
        ({"methods": [{"method": "fastv", "keep": 4, 3: 4}]}, "methods.0"),
        ({3: 4}, "unknown key 3"),
        *(
            ({"methods": [{"method": "fastv", "keep": 4, "label": label}]}, f"methods: {label[:3]!r}"[:-1])
            for label in (".", "..", "x" * 300)
        ),
        ({"methods": [{"method": "fastv", "keep": 4, "label": x} for x in ("a", "A")]}, "'a' and 'A' share a file"),
        ({"methods": [{"method": "fastv", "keep": 4, "label": "none"}]}, "two are called 'none'; give one of them"),
        ({None: 4}, "unknown key None"),
        ("? [a, b]\n: 1\n", "a list or a mapping cannot be a key"),
        ("seed: 2024-13-45\n", "month must be in 1..12"),
        ("seed: !!timestamp x\n", "not readable as YAML"),
        ("seed: !!int ''\n", "not readable as YAML"),
        ("seed: !!bool x\n", "not readable as YAML"),
        (f"seed: {'9' * 5000}\n", "Exceeds the limit"),
        ("seed: !!python/object/apply:os.system [ls]\n", "not readable as YAML"),
        ("tasks: " + "[" * 60 + "]" * 60, "more than 50 lists and mappings"),
        ("tasks: " + "[" * 50_000, "not readable as YAML"),
        ("tasks: &a [*a]\n", "an alias stands for something that contains it"),
        (laughs(8), "it stands for more than 20000 values"),
        ("tasks: [" + "x," * 30_000 + "]", "it stands for more than 20000 values"),
        ("#" * 2**21, "is larger than 1 MiB"),
        ("seed: \x00", "not readable as YAML"),
    ],
)
def test_mistakes_are_named(load, changes, message):
    with pytest.raises(ConfigError) as error:
        load(changes)
    assert message in str(error.value)
    assert "config.yaml" in str(error.value)


def test_a_file_that_is_not_utf_8(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"model: \xff\n")
    with pytest.raises(ConfigError, match=r"config.yaml: is not UTF-8 \(byte 8\)"):
        load_config(path)


def test_aliases_that_stand_for_little_are_fine(load):
    config = load(yaml.safe_dump(GOOD | {"methods": None}).replace("methods: null", "methods: [&a {method: fastv}]"))
    assert config.methods[0].method == "fastv"


def test_a_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "quickstart.yaml").touch()
    with pytest.raises(ConfigError, match="no such file. Did you mean 'quickstart.yaml'"):
        load_config(tmp_path / "quikstart.yaml")


def test_a_directory_is_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match="is a directory; give a YAML file"):
        load_config(tmp_path)


def test_baselines_without_a_budget(load):
    assert labels(load({"methods": ["none"], "budgets": []})) == ["none"]
    assert labels(load({"methods": ["drop_visual"], "budgets": [], "baselines": False})) == ["none", "drop_visual"]


def test_the_papers_models_are_shipped():
    names = {path.stem for path in SHIPPED}
    assert {"quickstart", "llava15_7b", "llava15_13b", "llava_next_7b", "llava_onevision_7b"} <= names


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_are_valid(path):
    config = load_config(path)
    rows = config.variants()
    assert rows[0].unpatched
    budgets = {str(v.budget) for v in rows if v.budget is not None} if config.baselines else set()
    assert {str(v.budget) for v in rows if v.stages[0]["method"] == "random"} == budgets
    assert config.output.is_relative_to("runs")


def test_shipped_files_do_not_write_to_one_directory():
    outputs = [load_config(path).output for path in SHIPPED]
    assert len(set(outputs)) == len(outputs)


@pytest.mark.parametrize("name, budgets", [("llava15_7b", [192, 128, 64]), ("llava15_13b", [192, 128, 64])])
def test_the_papers_budgets(name, budgets):
    config = load_config(next(path for path in SHIPPED if path.stem == name))
    assert config.budgets == budgets


def test_the_shares_of_llava_next_are_the_papers_counts():
    config = load_config(next(path for path in SHIPPED if path.stem == "llava_next_7b"))
    assert [round(share * 2880) for share in config.budgets] == [720, 640, 320, 288, 160]


@pytest.fixture(scope="module")
def registry():
    """lmms-eval's index of tasks; nothing is downloaded."""
    from vlmslim.evaluation.tasks import Tasks

    everything = [task for path in SHIPPED for task in load_config(path).tasks]
    union = load_config(SHIPPED[0]).model_copy(update={"tasks": everything})
    return Tasks(union)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_tasks_and_metrics_exist(registry, path):
    for task in load_config(path).tasks:
        leaves = registry.members(task.task)
        assert leaves
        for leaf in leaves:
            metrics = registry.metrics(leaf)
            usable = [name for name in metrics if name != "submission"]
            if task.metric is None:
                assert len(usable) == 1, f"{leaf} reports {usable}: say which one counts"
            else:
                assert task.metric in metrics


def test_baselines_meet_the_runs_budgets_where_no_method_has_one(load):
    stages = [{"stages": [{"method": "tokencorr", "alpha": 0.5}], "label": "own"}]
    assert labels(load({"methods": stages, "budgets": [64]})) == ["none", "random-64", "own"]


@pytest.mark.parametrize(
    "cost", [{"equivalent_tokens": True}, {"equivalent_tokens": float("inf")}, {"flops_ratio": True}]
)
def test_costs_are_finite_numbers(load, cost):
    with pytest.raises(ConfigError, match="Input should be a"):
        load({"budgets": [cost]})
