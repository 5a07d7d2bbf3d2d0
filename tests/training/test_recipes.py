"""ATP's and TokenFLEX's own training: the loss of ATP's budget, TokenFLEX's warm start, and runs that resume."""

import csv

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("pydantic", reason="the extra vlmslim[train] is not installed")

from training_data import Scenes

import vlmslim
from vlmslim.methods.atp import Decision, ThresholdModules
from vlmslim.training import atp, tokenflex
from vlmslim.training.finetune import Answers, Settings, load

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
    last = [torch.load(tmp_path / run / "last.pt", weights_only=True)["state"] for run in ("whole", "parts")]
    assert last[0] == last[1] and (recipe is tokenflex or last[0]["value"] != 0)
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


def decided(modules, *counts):
    """Let both modules of `modules` decide: two images with these counts after each of them."""
    for layer in (0, 2):
        kept = torch.tensor(counts)
        modules.decisions.append(Decision(layer, kept, kept.long(), kept, kept))


@pytest.mark.parametrize(("average", "away"), [("modules", 1.0), ("layers", 4 * 1 / 4 + 3 * 2 / 4 + 3 / 4 - 2)])
def test_the_loss_is_the_sum_of_equation_14(average, away):
    """Four layers, the first and the third followed by modules: the mean row has 4, 3, 3 and 3 tokens."""
    modules = ThresholdModules((0, 2), 4, 3)
    answers = Answers(torch.tensor(0.5), None, None, None)
    for rule, budget in (("distance", 0.2 * away), ("price", (0.7 + 3 * ((2 + away) / 4 - 0.4)) * (2 + away) / 4)):
        terms = atp.BudgetLoss(target=2, average=average, rule=rule, damping=3.0)
        price = terms.price(4)
        for name, value in dict(value=0.7, goal=0.4, started=1).items():
            getattr(price, name).fill_(value)
        loss = terms.loss(modules, depth=4, price=price)
        assert loss(answers, {}, 0) == (answers.loss, {})  # text alone
        decided(modules, 4.0, 2.0)
        total, numbers = loss(answers, {}, 0)
        assert total.item() == pytest.approx(0.5 + 0.05 * (3 / 4 * 2) + budget)
        assert numbers["hard"].item() == pytest.approx(2 + away) and numbers["after_2"].item() == 3
        assert not modules.decisions


def test_the_price_is_the_sum_of_what_a_running_mean_is_off():
    """Against a loop in doubles, with steps of several batches, and one without pictures, which changes nothing."""
    price = atp.Price(target=0.25, rate=0.3, damping=2.0, memory=0.8)
    steps = [[[0.9, 0.7], [0.8]], [[0.6, 0.4]], [], [[0.1], [0.2, 0.3]], [[0.5, 0.1]]]
    value = running = goal = first = None
    for number, batches in enumerate(steps):
        left = max(0, 1 - (number + 1) / 4)
        for batch in batches:
            share = torch.tensor(batch, requires_grad=True)
            cost = price.cost(share)
            now = 0 if value is None else value + 2.0 * (sum(batch) / len(batch) - goal)
            assert cost.item() == pytest.approx(now * sum(batch) / len(batch), abs=1e-6)
            cost.backward()
            assert share.grad.tolist() == pytest.approx([now / len(batch)] * len(batch), abs=1e-6)
        price.move(left)
        if flat := [share for batch in batches for share in batch]:
            mean = sum(flat) / len(flat)
            first = mean if first is None else first
            running = mean if running is None else 0.8 * running + 0.2 * mean
            goal = 0.25 + (first - 0.25) * left
            value = (value or 0) + 0.3 * (running - goal)
        assert [price.value.item(), price.running.item(), price.goal.item()] == pytest.approx([value, running, goal])


@pytest.mark.parametrize("target", [4.0, 12.0])
def test_the_price_meets_the_target_through_noisy_batches(target):
    """A toy: images of 16 tokens, an answer that gets better with the logarithm of the tokens, noise of two tokens.

    On the way to it the count does not swing far below, as it does without damping.
    """
    torch.manual_seed(0)
    budget = atp.BudgetLoss(target=target)
    price, logit = budget.price(16), torch.nn.Parameter(torch.tensor(2.0))
    optimizer, move, seen = torch.optim.SGD([logit], 0.1), budget.steer(price, 600), []
    for step in range(600):
        kept = 16 * logit.sigmoid()
        loss = -0.3 * kept.log() + price.cost((kept + 2 * torch.randn(8)) / 16)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        move(step)
        seen.append(kept.item())
    assert sum(seen[-50:]) / 50 == pytest.approx(target, rel=0.03)
    assert min(seen) > 0.8 * target
    assert price.value.item() == pytest.approx(0.3 * 16 / target, rel=0.1)  # where both pulls are equal


def test_a_budget_says_what_it_averages():
    with pytest.raises(ValueError, match="average='everything': use one of 'modules', 'layers'"):
        atp.BudgetLoss(target=2, average="everything")
    with pytest.raises(ValueError, match="rule='none': use one of 'price', 'distance'"):
        atp.BudgetLoss(target=2, rule="none")
    with pytest.raises(TypeError, match="target"):
        atp.BudgetLoss()


def test_a_checkpoint_without_the_price_is_refused(tmp_path):
    """It is of an earlier version, whose loss was another."""
    options = SMALL | dict(steps=2, script={"target": 36})
    train(atp, tmp_path, stop=1, **options)
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert saved["state"]["value"] != 0 and saved["state"]["running"] > 0
    del saved["state"]
    torch.save(saved, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="trained by other rules: use another --out"):
        train(atp, tmp_path, **options)


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
