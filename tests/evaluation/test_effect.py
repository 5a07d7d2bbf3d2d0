"""Stages that did not act: refused, or reported if they decide by themselves."""

import pytest
from evaluation_doubles import stage

from vlmslim.evaluation.effect import abstentions, check_effect


def receipt(*stages, images=700) -> dict:
    return {"images": images, "stages": list(stages)}


BEFORE = stage("divprune", acted=700, layers=(), tokens=(144.0, 64.0))
NONE = stage("none", layers=(), keeps_all=True)


@pytest.mark.parametrize(
    "stages",
    [
        [BEFORE],
        [stage(acted=1)],
        [stage(keeps_all=True)],
        [stage(decides=True)],
        [BEFORE, stage(acted=3)],
        [BEFORE, stage(keeps_all=True)],
        [stage(keeps_all=True), stage(acted=700)],
        [BEFORE, stage("drop_visual", decides=True)],
        [NONE],
        [NONE, NONE],
        [],
    ],
)
def test_stages_that_acted_or_may_abstain(stages):
    check_effect(receipt(*stages))


@pytest.mark.parametrize(
    "stages, sentence",
    [
        (
            [BEFORE, stage("drop_visual", layers=(1, 2, 3), tokens=(64.0, 64.0))],
            "stage 2 (drop_visual, before layers 1..3) acted on 0 of 700 prompts; it was not asked to keep everything, "
            "but 64.0 visual tokens of a prompt went in and 64.0 came out",
        ),
        ([stage("pool", layers=())], "stage 1 (pool, before the language model) acted on 0 of 700 prompts"),
        ([stage(layers=(2,)), BEFORE], "stage 1 (fastv, before layer 2) acted on 0 of 700 prompts"),
        ([stage(layers=(2, 4, 7))], "stage 1 (fastv, before layers 2, 4, 7) acted on 0"),
        ([stage(layers=(6, 7))], "stage 1 (fastv, before layers 6, 7) acted on 0"),
        ([stage(keeps_all=True), stage()], "stage 2 (fastv"),
        ([stage(decides=True), stage()], "stage 2 (fastv"),
        ([NONE, stage()], "stage 2 (fastv"),
    ],
)
def test_a_stage_that_never_acted_is_refused(stages, sentence):
    with pytest.raises(RuntimeError) as error:
        check_effect(receipt(*stages))
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize("stages", [[BEFORE], [stage(keeps_all=True)], [stage(decides=True)], [NONE, BEFORE]])
def test_a_task_without_images_is_refused(stages):
    with pytest.raises(RuntimeError, match="no image reached the model, so the method had nothing to do; take the"):
        check_effect(receipt(*stages, images=0))
    check_effect(receipt(NONE, images=0))


def test_abstentions_are_added_up_over_tasks():
    first = receipt(BEFORE, stage("drop_visual", acted=2, layers=(7,), decides=True, prompts=100))
    other = receipt(BEFORE, stage("drop_visual", acted=5, layers=(7,), decides=True, prompts=50))
    assert abstentions([first, other]) == ["stage 2 (drop_visual, before layer 7) acted on 7 of 150 prompts"]
    assert abstentions([first]) == ["stage 2 (drop_visual, before layer 7) acted on 2 of 100 prompts"]


def test_only_stages_that_decide_themselves_abstain():
    assert abstentions([receipt(stage("atp", acted=700, decides=True))]) == []
    assert abstentions([receipt(BEFORE, stage(keeps_all=True))]) == []
    assert abstentions([receipt(stage(acted=3))]) == []
    assert abstentions([{"images": 3}, receipt(BEFORE)]) == []  # the receipt of an older vlmslim
    assert abstentions([]) == []
