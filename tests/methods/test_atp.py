"""ATP-LLaVA in models: against a hand-run one, soft masks against removal, training, saved weights."""

import copy
import json
from math import e

import numpy as np
import pytest
import torch
from compare import close, greedy, lengths
from doubles import PairMean
from prompts import EQUAL, LONG_ROWS, ROWS, SEVERAL, Picture, batch, words
from tiny import BOS, tiny
from unpatched import reference

import vlmslim
from vlmslim.engine.families import kv_cache
from vlmslim.methods.atp import ATP, losses

SCORES = ("text", "literal", "visible", "learned")


def patched(model, logits=(0.0, 0.5), **options):
    """A patch whose thresholds lie in the middle of the scores and differ from image to image."""
    slim = vlmslim.patch(model, "atp", weights="random", **options)
    with torch.no_grad():
        for thresholds in slim.trained["atp"].after.values():
            thresholds.mix.weight.mul_(3)
            thresholds.heads.bias.copy_(torch.tensor(logits))
            if thresholds.balance is not None:
                thresholds.balance.copy_(torch.tensor([0.9, -0.4]))
    return slim


def totals(slim) -> list[float]:
    """Visual tokens that each layer has seen."""
    seen = slim.receipt.summary()
    return [seen["prompts"] * tokens for tokens in seen["visual_tokens_per_layer"]]


def watch(slim) -> list:
    """Every (layer, LayerInput, kept (B, S)) of the forwards to come."""
    seen, stage = [], slim.stages[-1]
    retain = stage.method.retain

    def spy(tokens):
        keep = retain(tokens)
        seen.append((tokens.layer, tokens, keep))
        return keep

    stage.method.retain = spy
    return seen


# --- the method in a model --------------------------------------------------------------------------------------------


single_grid = pytest.mark.parametrize("family", ["llava", "siglip"])


@single_grid
@pytest.mark.parametrize(
    "options",
    [{}, *(dict(score=score) for score in SCORES), dict(score="literal", normalised=False)],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)
@torch.no_grad()
def test_it_keeps_what_the_equations_say(family, options):
    """Every decision again, from the model's own attention maps, in loops."""
    model = tiny(family, "eager")
    row = SEVERAL[0]
    maps = []
    for layer in model.model.language_model.layers:
        layer.self_attn.register_forward_hook(lambda m, a, out: maps.append(out[1][0].double().mean(0).numpy()))
    logits = (-1.0, 0.8) if options.get("normalised", True) else (-4.0, 0.8)
    with patched(model, logits, **options) as slim:
        seen = watch(slim)
        model(**batch(model, [row]))
        modules = slim.trained["atp"]
    dropped = 0
    for number, (layer, tokens, keep) in enumerate(seen):
        attention, image, slot = maps[number], tokens.image[0].tolist(), tokens.slot[0].tolist()
        own, cross = np.zeros((2, 16)), np.zeros((2, 16))
        size = len(image)
        for key in range(size):
            if image[key]:
                peers = [q for q in range(size) if image[q] == image[key]]
                many = peers if options.get("score") == "literal" else [q for q in peers if q >= key]
                after = [q for q in range(key, size) if not image[q]]
                own[image[key] - 1, slot[key]] = sum(attention[q, key] for q in peers) / len(many)
                cross[image[key] - 1, slot[key]] = sum(attention[q, key] for q in after) / len(after)
        for i in range(2):
            here = sorted(slot[k] for k in range(size) if image[k] == i + 1)
            for score in (own, cross):
                if options.get("normalised", True):
                    values = score[i, here]
                    score[i, here] = (values - values.min()) / (np.ptp(values) + 1e-9)
            red = {"text": cross[i], "learned": (own[i] * e**0.9 + cross[i] * e**-0.4) / (e**0.9 + e**-0.4)}.get(
                options.get("score", "text"), (own[i] + cross[i]) / 2
            )
            theta = modules.after[str(layer - 1)](torch.tensor(own[i]).float(), torch.tensor(cross[i]).float())
            spatial = {0: 1 - 3 / 16, 2: 0.25, 8: 0.25, 10: 0.25}  # strides 2 and 4 of 4 x 4; 3 below
            spatial |= {3: 1 - 3 / 9, 12: 1 - 3 / 9, 15: 1 - 3 / 9}
            spatial[0] = 1 - 3 / 144
            want = {s for s in here if red[s] > theta[0] or spatial.get(s, 0) > theta[1]}
            want |= {max(here, key=lambda s: (red[s], -s))}
            got = {slot[k] for k in range(size) if image[k] == i + 1 and keep[0, k]}
            assert got == want
            dropped += len(here) - len(got)
    assert len(seen) == 3 and dropped > 4


@single_grid
@torch.no_grad()
def test_dropping_is_what_a_hand_run_model_does(family, backend):
    """Original rotary positions, in prefill and while decoding with the shortened cache."""
    model = tiny(family, backend)
    for row in LONG_ROWS[:2]:
        inputs = batch(model, [row])
        with patched(model) as slim:
            seen = watch(slim)
            out, logits = greedy(model, inputs)
            per_layer = slim.receipt.summary()["visual_tokens_per_layer"]
        drops, size = {}, inputs["input_ids"].shape[1]
        for layer, tokens, keep in seen:
            gone = torch.zeros(size + 5, dtype=torch.bool)
            gone[tokens.origin[0][~keep[0]]] = True
            drops[layer] = gone
        assert sum(int(gone.sum()) for gone in drops.values()) > 3
        ids = out.sequences[:, :-1]
        ref = reference(model, inputs | dict(input_ids=ids), drops=drops)
        close(logits[0], ref.logits()[size - 1 :])
        kept = [16 - sum(int(g.sum()) for at, g in drops.items() if at <= layer) for layer in range(4)]
        assert per_layer == kept
        assert lengths(kv_cache(out)) == [k + size - 16 + 5 for k in kept]


@pytest.mark.parametrize("rows", [LONG_ROWS, SEVERAL, EQUAL], ids=["long", "several", "equal"])
@single_grid
@torch.no_grad()
def test_a_batch_equals_its_rows_one_by_one(family, rows):
    model = tiny(family)
    with patched(model) as slim:
        out, logits = greedy(model, batch(model, rows))
        together = totals(slim)
        right = model(**batch(model, rows, "right")).logits
        slim.reset_receipt()
        for i, row in enumerate(rows):
            single, alone = greedy(model, batch(model, [row]))
            close(logits[i], alone[0])
            close(right[i, sum(16 if isinstance(x, Picture) else 1 for x in row) - 1], alone[0, 0])
        apart = totals(slim)
    np.testing.assert_allclose(together, apart)
    assert together[0] > together[-1]


@single_grid
@pytest.mark.parametrize("padding", ["left", "right"])
def test_training_with_hard_masks_sees_what_inference_sees(family, backend, padding):
    """Straight-through masks are 0 or 1, so nothing but the gradient tells training from dropping."""
    model = tiny(family, backend).requires_grad_(False)
    inputs = batch(model, SEVERAL, padding)
    with patched(model, hardened=True) as slim:
        want = model(**inputs).logits
        per_layer = slim.receipt.summary()["visual_tokens_per_layer"]
        slim.trained.train()
        got = model(**inputs, use_cache=False).logits
        modules = slim.trained["atp"]
    text = (inputs["input_ids"] < 98) & (inputs["attention_mask"] > 0)
    close(got[text], want[text])
    assert torch.equal(modules.counts("soft"), modules.counts("hard").float())
    np.testing.assert_allclose(modules.counts("hard").sum(0) / 2, per_layer[1:], rtol=1e-6)  # two prompts, three images
    assert modules.counts().shape == (3, 3)
    got[text].logsumexp(-1).sum().backward()
    assert all(p.grad.abs().max() > 0 for n, p in modules.named_parameters() if "heads" in n)


@pytest.mark.parametrize("options", [{}, dict(hardened=True), dict(detached=False), dict(score="learned")], ids=str)
def test_gradients_reach_the_thresholds_alone(options):
    model = tiny("llava").requires_grad_(False)
    inputs = batch(model, LONG_ROWS[:2])
    with patched(model, **options) as slim:
        slim.trained.train()
        out = model(**inputs, labels=inputs["input_ids"].where(inputs["input_ids"] < 98, -100), use_cache=False)
        modules = slim.trained["atp"]
        (out.loss + modules.counts().mean()).backward()
    for name, p in modules.named_parameters():
        assert torch.isfinite(p.grad).all() and p.grad.abs().max() > 0, name
    assert all(p.grad is None for p in model.parameters())


def test_a_row_without_an_image_or_with_fewer_trains():
    model = tiny("llava")
    inputs = batch(model, [*SEVERAL, LONG_ROWS[2]])
    with patched(model, detached=False) as slim:
        slim.trained.train()
        out = model(**inputs, use_cache=False)
        assert slim.trained["atp"].counts().shape == (3, 3)
        out.logits.logsumexp(-1).mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.model.language_model.parameters())
    with patched(model) as slim, torch.no_grad():
        close(model(**inputs).logits[2, -1], model(**batch(model, [LONG_ROWS[2]])).logits[0, -1])


def test_the_budget_is_learned():
    """A few steps on the budget alone bring the soft count to the target, and the hard one near it."""
    model = tiny("llava").requires_grad_(False)
    inputs = batch(model, EQUAL)
    with vlmslim.patch(model, "atp", weights="random") as slim:
        modules = slim.trained["atp"].train()
        optimizer = torch.optim.Adam(modules.parameters(), 0.01)
        found = []
        for step in range(60):
            modules.temperature = 10 * 6 ** (step / 60)
            model(**inputs, use_cache=False)
            average = losses.mean_tokens(modules.counts(), modules.layers, modules.patches)
            loss = losses.target_loss(average, 3)
            found.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert found[0] > 2 and sum(found[-10:]) / 10 < 0.5
        modules.eval()
        slim.reset_receipt()
        with torch.no_grad():
            model(**inputs)
        kept = slim.receipt.summary()["visual_tokens_per_layer"][1:]
    assert abs(sum(kept) / 3 - 3) < 1


@single_grid
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_runs(family, dtype):
    model = tiny(family, dtype=dtype)
    with patched(model) as slim:
        _, logits = greedy(model, batch(model, LONG_ROWS))
        assert {p.dtype for p in slim.trained.parameters()} == {torch.float32}
        slim.trained.train()
        assert torch.isfinite(model(**batch(model, LONG_ROWS), use_cache=False).logits).all()
    assert torch.isfinite(logits).all()
    assert slim.receipt.summary()["had_effect"]


@torch.no_grad()
def test_at_least_so_many_stay():
    model = tiny("llava")
    inputs = batch(model, SEVERAL)
    for least in (0, 1, 3):
        with patched(model, (20.0, 20.0), at_least=least) as slim:
            logits = model(**inputs).logits
            assert slim.receipt.summary()["visual_tokens_per_layer"] == [24, *[1.5 * least] * 3]
        assert torch.isfinite(logits).all()
    with patched(model, (-20.0, 0.0)) as slim:  # all but the weakest of each image, which scores 0 on both maps or not
        model(**inputs)
        assert slim.receipt.summary()["visual_tokens_per_layer"][-1] >= 24 - 3 * 1.5


@torch.no_grad()
def test_a_method_before_it_has_to_say_where_its_tokens_are():
    model = tiny("llava")
    inputs = batch(model, ROWS)
    stages = [vlmslim.method("divprune", keep=9), ATP(weights="random")]
    with vlmslim.patch(model, stages) as slim:
        seen = watch(slim)
        model(**inputs)
    place, slot = seen[0][1].origin[0], seen[0][1].slot[0]
    first = int((inputs["input_ids"][0] == 99).nonzero()[0])
    visual = slot >= 0
    assert int(visual.sum()) == 9 and torch.equal(place[visual] - first, slot[visual])
    with vlmslim.patch(model, [PairMean(), ATP(weights="random")]), pytest.raises(ValueError, match="merged"):
        model(**inputs)


# --- weights ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_saved_and_loaded(tmp_path):
    model = tiny("llava")
    inputs = batch(model, LONG_ROWS)
    with patched(model, score="learned", width=8) as slim:
        want = model(**inputs).logits
        kept = slim.receipt.summary()["visual_tokens_per_layer"]
        slim.save_pretrained(tmp_path / "atp")
    for options in (
        dict(method=tmp_path / "atp"),
        dict(method="atp", weights=str(tmp_path / "atp"), score="learned", width=8),
    ):
        with vlmslim.patch(model, **options) as slim:
            assert torch.equal(model(**inputs).logits, want)
            assert slim.receipt.summary()["visual_tokens_per_layer"] == kept
    with pytest.raises(ValueError, match="other options of the method; after.0.balance"):
        vlmslim.patch(model, "atp", weights=str(tmp_path / "atp"), width=8)
    with pytest.raises(ValueError, match="other options"):
        vlmslim.patch(model, "atp", weights=str(tmp_path / "atp"), score="learned", width=9)
    with pytest.raises(ValueError, match="another backbone"):
        vlmslim.patch(tiny("siglip"), tmp_path / "atp")


@pytest.mark.parametrize(("mean", "score"), [("all", "literal"), ("visible", "visible")])
@torch.no_grad()
def test_a_part_of_an_earlier_version_loads_with_its_own_score(mean, score, tmp_path):
    """It was saved with the option `mean` and without `score`."""
    model = tiny("llava")
    inputs = batch(model, LONG_ROWS)
    with patched(model, score=score) as slim:
        want = model(**inputs).logits
        slim.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "vlmslim.json").read_text())
    assert config["methods"][0].pop("score") == score
    config["methods"][0]["mean"] = mean
    (tmp_path / "vlmslim.json").write_text(json.dumps(config))
    for again in (tmp_path, {"method": "atp", "weights": str(tmp_path), "score": score}):
        with vlmslim.patch(model, again) as slim:
            assert slim.methods[0].score == score
            assert torch.equal(model(**inputs).logits, want)
    with pytest.raises(ValueError, match=f"was trained with score='{score}'; give these options"):
        vlmslim.patch(model, "atp", weights=str(tmp_path))
    with pytest.raises(ValueError, match=f"mean='{mean}' means score='{score}'"):
        vlmslim.patch(model, tmp_path, score="learned")


def test_a_learned_score_starts_with_equal_weights_and_learns_them():
    """One pair of weights a module, which the gradient of the counts reaches although the scores are detached."""
    model = tiny("llava").requires_grad_(False)
    with vlmslim.patch(model, "atp", weights="random", score="learned") as slim:
        modules = slim.trained["atp"].train()
        assert [module.balance.tolist() for module in modules.after.values()] == [[0, 0]] * 3
        model(**batch(model, LONG_ROWS[:2]), use_cache=False)
        modules.counts().sum().backward()
    for module in modules.after.values():
        image, text = module.balance.grad.tolist()
        assert image == pytest.approx(-text, rel=1e-2) and abs(text) > 1e-3


def test_what_a_model_cannot_have_is_refused():
    for family in ("next", "onevision"):
        with pytest.raises(ValueError, match="single grid"):
            vlmslim.patch(tiny(family), "atp", weights="random")
    model = tiny("llava")
    with pytest.raises(ValueError, match=r"docs/training\.md"):
        vlmslim.patch(model, "atp")
    for after in ((2, 1), (1, 1), (3,), (0.1, 0.2)):
        with pytest.raises(ValueError, match="ascend"):
            vlmslim.patch(model, "atp", weights="random", after=after)
    vlmslim.patch(model, "none").remove()


def test_the_method_has_no_state_of_its_own():
    """Two models patched with one object do not share modules."""
    method = ATP(weights="random")
    models = [tiny("llava"), tiny("llava")]
    slims = [vlmslim.patch(model, method) for model in models]
    parts = [slim.trained["atp"] for slim in slims]
    assert parts[0] is not parts[1] and copy.copy(method) == method
    assert not any("atp" in name for name in models[0].state_dict())
    row = [BOS, Picture(0), *words(0, 5)]
    with torch.no_grad():
        close(*(model(**batch(model, [row])).logits for model in models), 1e-6)
