"""`share_prefix`: prompts that begin alike go on from one KV cache, and nothing that a board says changes."""

import pytest
import torch

pytest.importorskip("lmms_eval", reason="the extra vlmslim[eval] is not installed")

from lmms_fixtures import FAMILIES
from lmms_requests import ask, texts

import vlmslim
from vlmslim.compressor import Compressor
from vlmslim.evaluation.config import RunConfig
from vlmslim.evaluation.prefix import SharedPrefix

SYSTEM = "A chat between a curious user and an assistant."
METHODS = [
    {},
    {"method": "divprune", "keep": 5, "positions": "original"},
    {"method": "divprune", "keep": 5, "positions": "renumbered"},
    {"method": "pool", "keep": 4},
    {"method": "fastv", "keep": 5, "layer": 2},  # looks at all states of the prompt, so it shares nothing
]


def both(make, **arguments):
    """The same model twice: with whole prompts, and with a shared beginning."""
    return [make(batch_size=4, system_prompt=SYSTEM, share_prefix=share, **arguments) for share in (False, True)]


def computed(lm) -> list[int]:
    """Return where the tokens of each forward of the first decoder layer are counted."""
    tokens: list[int] = []
    layer = lm.model.model.language_model.layers[0]
    layer.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[0] * args[0].shape[1]))
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_answers_losses_and_receipts_are_those_of_whole_prompts(make, family, method):
    whole, shared = both(make, family=family, **method)
    counted = [computed(lm) for lm in (whole, shared)]
    requests = [ask(i) for i in range(10)]
    assert texts(whole, requests) == texts(shared, requests)
    scored = [ask(i, f" {answer}", kind="loglikelihood") for i in range(5) for answer in ("red", "dark green")]
    losses = [lm.loglikelihood(scored) for lm in (whole, shared)]
    torch.testing.assert_close(*([loss for loss, _ in own] for own in losses), atol=1e-4, rtol=1e-4)
    told = [lm.receipt for lm in (whole, shared)]
    for receipt in told:
        for name in [name for name in receipt if name.endswith("_ms")]:
            receipt.pop(name)
    assert told[0] == told[1]
    assert (sum(counted[0]) > 1.2 * sum(counted[1])) == (method.get("method") != "fastv")


def test_a_method_reads_the_whole_prompt(make):
    class Reader(Compressor):
        def compress(self, image):
            read.append(image.prompt.tolist())
            return image.pick(torch.arange(5))

    words = []
    for lm in both(make):
        read: list[list[int]] = []
        lm._slim.remove()
        with vlmslim.patch(lm.model, Reader()):
            texts(lm, [ask(0), ask(2)])
        words.append(read)
    assert words[0] == words[1] and len(words[0]) == 2


def test_prompts_without_a_picture_or_without_a_common_beginning_share_nothing(make):
    model = make().model
    picture = model.config.image_token_id
    for rows in ([[5, 6, 7], [5, 6, 8]], [[5, picture, 7], [6, picture, 7]], [[picture, 6, 7], [picture, 6, 8]]):
        ids = torch.tensor(rows)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert SharedPrefix(model).shortened(inputs) is inputs


def test_another_family_is_refused(make):
    lm = make()
    lm.model.config.model_type = "qwen2_5_vl"
    with pytest.raises(ValueError, match="share_prefix is for the families llava, .*, and this is qwen2_5_vl"):
        SharedPrefix(lm.model)


def test_a_run_records_it_only_where_it_is_on():
    def arguments(**keys):
        config = {"model": {"pretrained": "bundled/tiny-llava"} | keys, "tasks": ["gqa"], "methods": ["none"]}
        return RunConfig.model_validate(config | {"output": "out"}).shared()["model"]

    assert arguments() == arguments(share_prefix=False) == {"pretrained": "bundled/tiny-llava"}
    assert arguments(share_prefix=True)["share_prefix"] is True
