"""ATP's and TokenFLEX's own training: the loss of ATP's budget, TokenFLEX's warm start, and runs that resume."""

import csv

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("pydantic", reason="the extra vlmslim[train] is not installed")

from training_data import Scenes  # noqa: E402

import vlmslim  # noqa: E402
from vlmslim.methods.atp import Decision, ThresholdModules  # noqa: E402
from vlmslim.training import atp, tokenflex  # noqa: E402
from vlmslim.training.finetune import Answers, Settings, load  # noqa: E402

SMALL = dict(steps=3, batch=1, workers=0, device="cpu", precision="no", save_every=1, log_every=1)


def train(recipe, out, stop=None, **options) -> list[dict]:
    """Train on three scenes; returns the log without the seconds."""
    recipe.train(Settings(**SMALL | options), Scenes(3, questions=2), out, stop)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    with (out / "log.csv").open() as file:
        return [{k: v for k, v in line.items() if k != "seconds"} for line in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe, options",
    [
        (atp, {"script": {"target": 36}}),
        (tokenflex, {"script": {"warm_start": 2}, "method": {"counts": [4, 9], "probabilities": [0.5, 0.5]}}),
    ],
    ids=["atp", "tokenflex"],
)
def test_a_run_resumes_to_the_same_weights_which_patch_the_model(recipe, options, tmp_path):
    whole = train(recipe, tmp_path / "whole", **options)
    assert len(train(recipe, tmp_path / "parts", stop=2, **options)) == 2
    assert not (tmp_path / "parts" / "final").exists()
    assert train(recipe, tmp_path / "parts", **options) == whole
    states = [load_file(next((tmp_path / run / "final").glob("vlmslim-*"))) for run in ("whole", "parts")]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    slim = vlmslim.from_pretrained(tmp_path / "whole" / "final")
    prompt = "USER: <image>\nIs there a cat? ASSISTANT:"
    inputs = slim.processor(text=prompt, images=Image.new("RGB", (192, 192), (200, 80, 10)), return_tensors="pt")
    with torch.no_grad():
        slim.model(**inputs)
    layers = slim.receipt.summary()["visual_tokens_per_layer"]
    assert layers == sorted(layers, reverse=True) and slim.receipt.summary()["had_effect"]
    if recipe is atp:
        assert layers[:2] == [144, 144]
        assert all(0 < float(line[k]) <= 144 for line in whole for k in ("soft", "hard", "after_1", "after_3"))


def test_atp_needs_a_number_of_steps(tmp_path):
    with pytest.raises(ValueError, match="give steps="):
        atp.train(Settings(steps=0), Scenes(1), tmp_path)


def test_the_temperature_rises_geometrically():
    modules = ThresholdModules((0, 2), 4, 3)
    set_temperature = atp.BudgetLoss(target=2).anneal(modules, 5)
    seen = []
    for step in range(5):
        set_temperature(step)
        seen.append(modules.temperature)
    assert seen == pytest.approx([10 * 6 ** (i / 4) for i in range(5)])


@pytest.mark.parametrize(("average", "away"), [("modules", 1.0), ("layers", 4 * 1 / 4 + 3 * 2 / 4 + 3 / 4 - 2)])
def test_the_loss_is_the_sum_of_equation_14(average, away):
    """Four layers, the first and the third followed by modules: the mean row has 4, 3, 3 and 3 tokens."""
    modules = ThresholdModules((0, 2), 4, 3)
    answers = Answers(torch.tensor(0.5), None, None, None)
    loss = atp.BudgetLoss(target=2, average=average).loss(modules, depth=4)
    assert loss(answers, {}, 0) == (answers.loss, {})  # text alone
    for layer in (0, 2):
        counts = torch.tensor([4.0, 2.0])
        modules.decisions.append(Decision(layer, counts, counts.long(), counts, counts))
    total, numbers = loss(answers, {}, 0)
    assert total.item() == pytest.approx(0.5 + 0.05 * (3 / 4 * 2) + 0.2 * away)
    assert numbers["hard"].item() == pytest.approx(2 + away) and numbers["after_2"].item() == 3
    assert not modules.decisions


def test_a_budget_says_what_it_averages():
    with pytest.raises(ValueError, match="average='everything': use one of 'modules', 'layers'"):
        atp.BudgetLoss(target=2, average="everything")
    with pytest.raises(TypeError, match="target"):
        atp.BudgetLoss()


def test_the_warm_start_brings_the_projector_to_the_models_own():
    settings = Settings(**SMALL, method=dict(counts=[4, 16], probabilities=[0.5, 0.5]))
    model, processor = load(settings)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    left = []
    for steps in (2, 60):
        with vlmslim.patch(model, "tokenflex", weights="random", keep=16, **settings.method) as slim:
            left.append(tokenflex.warm_start(slim, processor, Scenes(4, 1), settings, pictures=3, steps=steps))
    assert left[1] < 0.5 * left[0]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
