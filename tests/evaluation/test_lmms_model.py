"""The lmms-eval model: batches, log-likelihood, protocols, pictures and videos, errors."""

import numpy as np
import pytest
import torch

pytest.importorskip("lmms_eval", reason="the extra vlmslim[eval] is not installed")

from lmms_eval.api.instance import Instance
from lmms_fixtures import FAMILIES, checkpoint, picture, question, video
from lmms_requests import GENERATE, ask, forced, pictures_of, texts

from vlmslim.evaluation.conversation import Prompt, read_frames, user_message
from vlmslim.evaluation.generation import generation_options
from vlmslim.evaluation.lmms_model import VlmSlim, VlmSlimChat
from vlmslim.evaluation.queries import RequestError

methods = pytest.mark.parametrize(
    "method", [{}, {"method": "divprune", "keep": 5}, {"method": "fastv", "keep": 5, "layer": 2}]
)


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@methods
def test_a_batch_of_eight_answers_as_singles_do(make, family, method):
    requests = [ask(i) for i in range(10)]
    answers = [texts(make(family, batch_size=n, **method), requests) for n in (1, 8)]
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 5  # the pictures and questions make a difference


@pytest.mark.parametrize("family", FAMILIES)
@methods
def test_log_likelihoods_of_a_batch_are_those_of_singles(make, family, method):
    requests = [ask(i, f" {answer}", kind="loglikelihood") for i in range(5) for answer in ("red", "dark green")]
    single, batch = (make(family, batch_size=n, **method).loglikelihood(requests) for n in (1, 8))
    torch.testing.assert_close([loss for loss, _ in batch], [loss for loss, _ in single], atol=1e-4, rtol=1e-4)
    assert [greedy for _, greedy in batch] == [greedy for _, greedy in single]


def test_requests_with_other_generation_arguments_do_not_share_a_batch(make):
    lm = make(batch_size=8)
    short = ask(0, {"max_new_tokens": 2})
    both = [r.token_counts.output_tokens for r in lm.generate_until([short, ask(1), short, ask(2)])]
    assert both == [2, 8, 2, 8]


# --- log-likelihood ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@methods
def test_log_likelihood_is_that_of_forced_decoding(make, family, method):
    lm = make(family, batch_size=4, **method)
    answers = ["red", "dark green", "yes, it is blue", "7"]
    requests = [ask(i, f" {answer}", kind="loglikelihood") for i in range(4) for answer in answers]
    expected = [forced(lm, i, answer) for i in range(4) for answer in answers]
    assert len({n for _, _, n in expected}) > 2  # answers of one token and of several
    for (loss, greedy), (want, want_greedy, _) in zip(lm.loglikelihood(requests), expected, strict=True):
        assert loss == pytest.approx(want, abs=1e-4)
        assert greedy == want_greedy


@methods
def test_the_choices_of_a_question_share_one_prefill_and_score_as_each_alone(make, method):
    lm, answers = make(batch_size=1, **method), ["red", "dark green", "yes, it is blue", "7"]
    requests = [ask(i, f" {answer}", kind="loglikelihood") for i in range(3) for answer in answers]
    together = lm.loglikelihood(requests)
    assert lm.receipt["prompts"] == 3
    assert together == [lm.loglikelihood([request])[0] for request in requests]


def test_greedy_answers_are_recognised(make):
    lm = make(batch_size=4)
    plain = lm.tokenizer.convert_tokens_to_ids("▁red")
    lm.model.lm_head.weight.data[plain] += 100 * lm.model.lm_head.weight.data[plain].sign()
    scores = lm.loglikelihood([ask(i, " red", kind="loglikelihood") for i in range(8)])
    expected = [forced(lm, i, "red") for i in range(8)]
    assert [greedy for _, greedy in scores] == [greedy for _, greedy, _ in expected]
    assert {True, False} == {greedy for _, greedy in scores}


def test_the_target_may_be_a_function_of_the_document(make):
    lm = make()
    by_function = lm.loglikelihood([ask(2, lambda doc: ["red", "green", "blue"][doc["id"]], kind="loglikelihood")])
    assert by_function == lm.loglikelihood([ask(2, " blue", kind="loglikelihood")])


def test_an_answer_that_merges_with_the_prompt_starts_at_the_merged_token(make):
    prompter = make().prompter
    template = prompter.processor.chat_template
    prompter.processor.chat_template = template.replace("'ASSISTANT:'", "'ASSISTANT: '")  # no blank before an answer
    whole, before, answer = prompter.continued(Prompt("USER: it is re"), "d")
    ids = prompter.tokenizer(whole.text)["input_ids"]
    assert whole.text == "USER: it is red"
    assert before + answer == ids
    assert prompter.tokenizer.decode(answer).endswith("red")  # "red" is one token, "re" was another


def test_an_empty_continuation_is_an_error(make):
    with pytest.raises(RequestError, match="quiz document 4: ValueError: nothing to score"):
        make().loglikelihood([ask(4, " ", kind="loglikelihood")])


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_pictures_go_in_front_unless_the_text_places_them(make):
    prompter = make().prompter
    two = [picture(0), picture(1)]
    assert prompter.render(user_message("Same?", two)).text == "USER: <image>\n<image>\nSame? ASSISTANT:"
    placed = prompter.render(user_message("Is <image> the same as <image>?", two))
    assert placed.text == "USER: Is <image> the same as <image>? ASSISTANT:"
    assert len(placed.media["image"]) == 2


@pytest.mark.parametrize("text, count", [("Is <image> red?", 2), ("Is it like <image>?", 0), ("<image><image>", 1)])
def test_pictures_and_placeholders_must_agree(make, text, count):
    requests = [ask(7, text=text, visuals=lambda doc: [picture(j) for j in range(count)])]
    with pytest.raises(RequestError, match=rf"quiz document 7: .*<image> in the prompt for {count} image"):
        make().generate_until(requests)


def test_a_template_that_prints_no_placeholder_is_an_error(make):
    lm = make()
    lm.processor.chat_template = "{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}"
    with pytest.raises(RequestError, match="0 <image> in the prompt for 1 image.*chat template must print them"):
        lm.generate_until([ask(0)])


def test_the_system_prompt_comes_first(make, tmp_path):
    (tmp_path / "system.txt").write_text("Be brief.\n")
    for system in ("Be brief.", str(tmp_path / "system.txt")):
        rendered = make(system_prompt=system).prompter.render(user_message("Why?", None))
        assert rendered.text == "SYSTEM: Be brief. USER: Why? ASSISTANT:"


def test_the_protocol_of_the_papers(folder):
    lm = VlmSlim(checkpoint("llava", folder), protocol="original")
    assert lm.protocol == {"protocol": "original", "image_aspect_ratio": "pad", "conversation": "vicuna_v1"}
    lm.task_dict = {"quiz": {"test": [{"id": i} for i in range(12)]}}
    asked = lm.prompter.render(user_message("Why?", [picture(0)]))
    assert asked.text.endswith("the user's questions. USER: <image>\nWhy? ASSISTANT:")
    wide = lm.inputs([ask(0)])["pixel_values"][0]
    assert (wide[:, 0] == wide[:, 0, :1]).all()  # the first row of a wide picture is of one colour
    with pytest.raises(ValueError, match="protocol='papers': use original or hf"):
        VlmSlim("/nowhere", protocol="papers")


def test_a_template_with_its_own_beginning_of_sequence_gets_no_second_one(make):
    lm = make()
    bos = lm.tokenizer.bos_token_id
    assert (lm.inputs([ask(0)])["input_ids"] == bos).sum() == 1
    lm.processor.chat_template = "{{ bos_token }}" + lm.processor.chat_template
    assert (lm.inputs([ask(0)])["input_ids"] == bos).sum() == 1


def test_generation_arguments():
    options, until = generation_options({"until": "\n", "top_p": 0.9, "num_beams": 2, "image_aspect_ratio": "pad"})
    assert until == ["\n"]
    assert options["num_beams"] == 2 and options["max_new_tokens"] == 1024
    assert options["do_sample"] is False and options["top_p"] is None
    options, until = generation_options({"do_sample": True, "temperature": 0.5, "top_p": None, "max_gen_toks": 3})
    assert options == {"do_sample": True, "temperature": 0.5, "max_new_tokens": 3} and until == []
    assert generation_options({"do_sample": True, "temperature": 0})[0]["do_sample"] is False
    assert generation_options({"do_sample": True})[0]["do_sample"] is True


def test_answers_end_at_the_first_stop_string(make):
    lm = make()
    whole = texts(lm, [ask(0)])[0]
    stops = [whole[5:7], whole[3:5]]
    assert texts(lm, [ask(0, GENERATE | {"until": stops})])[0] == whole[: min(map(whole.find, stops))]


# --- videos -----------------------------------------------------------------------------------------------------------


def test_frames_are_spread_over_the_video(tmp_path):
    path = video(tmp_path / "bright.mp4", frames=20)
    frames = read_frames(path, 5)
    assert frames.shape == (5, 48, 64, 3) and frames.dtype == np.uint8
    brightness = frames.mean((1, 2, 3))
    np.testing.assert_allclose(brightness, [10 + 10 * i for i in (0, 4, 9, 14, 19)], atol=4)
    assert len(read_frames(path, 99)) == 20


@pytest.mark.parametrize("family", ["llava", "onevision"])
def test_videos(make, tmp_path, family):
    path = video(tmp_path / "bright.mp4")
    lm = make(family, batch_size=4, max_frames_num=3)
    mixed = [ask(i, visuals=lambda doc: [path] if doc["id"] % 2 else [picture(doc["id"])]) for i in range(4)]
    inputs = lm.inputs(mixed[1:2])
    assert ("pixel_values_videos" in inputs) == (family == "onevision")
    if family == "onevision":
        assert inputs["pixel_values_videos"].shape[1] == 3
    else:  # no video processor: the frames are images
        assert len(inputs["pixel_values"]) == 3
    batch = texts(lm, mixed)
    lm.batch_size = 1
    assert texts(lm, mixed) == batch


def test_a_missing_video_names_its_document(make):
    with pytest.raises(RequestError, match="quiz document 2: FileNotFoundError.*gone.mp4"):
        make().generate_until([ask(2, visuals=lambda doc: ["/gone.mp4"])])


# --- protocols --------------------------------------------------------------------------------------------------------


def chat_ask(i: int, messages) -> Instance:
    arguments = (question(i), messages, GENERATE, i, "quiz", "test")
    return Instance("generate_until", arguments, 0, {"task": "quiz", "doc_id": i, "repeats": 1})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_chat_protocol_gives_the_answers_of_the_simple_one(make, family):
    simple = texts(make(family, batch_size=4), [ask(i) for i in range(6)])
    chat = make(family, VlmSlimChat, batch_size=4)
    build = lambda doc: user_message(question(doc["id"]), pictures_of(doc))  # noqa: E731
    assert texts(chat, [chat_ask(i, build) for i in range(6)]) == simple


def rounds_of(doc: dict) -> int:
    return 1 + doc["id"] % 3


def next_text(doc, round_idx, previous_output, previous_round_info):
    if round_idx == rounds_of(doc):
        return None, None, True, previous_output, None
    seen = (previous_round_info or 0) + 1
    return [picture(round_idx)], f"{previous_output[-1]} {question(round_idx)}", False, previous_output, seen


def test_several_rounds(make):
    lm = make(batch_size=4)
    simple = lm.generate_until_multi_round(
        [ask(i, GENERATE, next_text, kind="generate_until_multi_round") for i in range(6)]
    )
    # The simple protocol puts doc_to_visual between the arguments.
    assert [len(answers) for answers in simple] == [rounds_of({"id": i}) for i in range(6)]
    first = texts(lm, [ask(i) for i in range(6)])
    assert [answers[0] for answers in simple] == first
    second = ask(1, text=f"{simple[1][0]} {question(1)}", visuals=lambda doc: [picture(1)])
    assert simple[1][1] == texts(lm, [second])[0]

    def next_messages(doc, round_idx=None, **state):
        if round_idx is None:
            return user_message(question(doc["id"]), pictures_of(doc))
        visuals, text, *rest = next_text(doc, round_idx, **state)
        return (text and user_message(text, visuals), *rest)

    chat = make(cls=VlmSlimChat, batch_size=4)
    assert chat.generate_until_multi_round([chat_ask(i, next_messages) for i in range(6)]) == simple


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"method": "divprun", "keep": 4}, "Did you mean 'divprune'"),
        ({"method": "divprune", "kep": 4}, "Did you mean 'keep'"),
        ({"max_frames": 4}, "argument of the model. Did you mean 'max_frames_num'"),
        ({"keep": 4}, "unknown option of none 'keep'"),
        ({"method": "divprune", "keep": 0}, "at least one visual token"),
        ({"method": "divprune", "keep": 1.5}, r"\(0, 1\]"),
        ({"batch_size": "auto"}, "whole number"),
        ({"max_frames_num": 0}, "whole number"),
        ({"dtype": "float33"}, "use float32, bfloat16"),
        ({"method": '[{"method": "divprune", "keep": 4}]', "keep": 4}, "belong into the stages"),
        ({"method": "[{method: divprune}]"}, "this is no JSON .*; write stages as method="),
    ],
)
def test_wrong_arguments(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_arguments_are_read_from_a_string(folder):
    text = f"pretrained={checkpoint('llava', folder)},method=divprune,keep=0.25,order=selection"
    lm = VlmSlim.create_from_arg_string(text, {"batch_size": "8", "device": "cpu", "max_batch_size": None})
    assert lm.batch_size == 8 and "keep=0.25" in lm.receipt["method"] and "selection" in lm.receipt["method"]
    stages = '[{"method": "divprune", "keep": 8}, {"method": "fastv", "keep": 4, "layer": 2}]'
    lm = VlmSlim.create_from_arg_string(f"pretrained={checkpoint('llava', folder)},method={stages}")
    assert "DivPrune" in lm.receipt["method"] and "FastV" in lm.receipt["method"]


def test_an_exception_names_its_task_and_document(make):
    lm = make(batch_size=2)

    def broken(doc):
        if doc["id"] == 3:
            raise OSError("truncated picture")
        return [picture(0)]

    with pytest.raises(RequestError, match="quiz document 3: OSError: truncated picture") as caught:
        lm.generate_until([ask(i, visuals=broken) for i in range(5)])
    assert isinstance(caught.value.__cause__, OSError)

    def fail(*args, **kwargs):
        raise RuntimeError("device lost")

    lm.model.generate = fail
    with pytest.raises(RequestError, match="quiz document 0, quiz document 2: RuntimeError: device lost|quiz document"):
        lm.generate_until([ask(0), ask(2)])


def test_a_budget_larger_than_the_image_stops_the_run(make):
    with pytest.raises(RequestError, match="quiz document 0.*larger than the image"):
        make(method="divprune", keep=1000).generate_until([ask(0)])
