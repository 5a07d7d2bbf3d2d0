"""The lmms-eval model: batches, log-likelihood, protocols, pictures and videos, errors, receipts."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lmms_eval", reason="the extra vlmslim[eval] is not installed")

from lmms_eval.api.instance import Instance  # noqa: E402
from lmms_eval.tasks import TaskManager  # noqa: E402
from lmms_fixtures import (  # noqa: E402
    COLOURS,
    FAMILIES,
    checkpoint,
    picture,
    question,
    questions,
    run_lmms_eval,
    stock_answers,
    video,
)
from loguru import logger  # noqa: E402

from vlmslim.evaluation.conversation import Prompt, Prompter, read_frames, user_message  # noqa: E402
from vlmslim.evaluation.generation import generation_options  # noqa: E402
from vlmslim.evaluation.lmms_model import VlmSlim, VlmSlimChat  # noqa: E402
from vlmslim.evaluation.queries import RequestError  # noqa: E402

GENERATE = {"max_new_tokens": 8, "until": ["\n\n"], "temperature": 0, "do_sample": False}


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("lmms")


@pytest.fixture
def make(folder):
    """Makes models of a family; the checkpoint is read once."""

    def make(family="llava", cls=VlmSlim, **arguments):
        lm = cls(checkpoint(family, folder), **arguments)
        lm.task_dict = {"quiz": {"test": [{"id": i} for i in range(12)]}}
        return lm

    return make


def pictures_of(doc: dict) -> list:
    """Most questions have one picture, some have two or none."""
    count = {1: 2, 3: 0, 5: 2}.get(doc["id"], 1)
    return [picture(doc["id"] + j) for j in range(count)]


def ask(i: int, *extra, kind="generate_until", visuals=pictures_of, text=None) -> Instance:
    extra = extra or (GENERATE,)
    arguments = (text or question(i), extra[0], visuals, *extra[1:], i, "quiz", "test")
    return Instance(kind, arguments, 0, {"task": "quiz", "doc_id": i, "repeats": 1})


def texts(lm, requests) -> list[str]:
    return [result.text for result in lm.generate_until(requests)]


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [{}, {"method": "divprune", "keep": 5}, {"method": "fastv", "keep": 5, "layer": 2}])
def test_a_batch_of_eight_answers_as_singles_do(make, family, method):
    requests = [ask(i) for i in range(10)]
    answers = [texts(make(family, batch_size=n, **method), requests) for n in (1, 8)]
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 5  # the pictures and questions make a difference


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [{}, {"method": "divprune", "keep": 5}, {"method": "fastv", "keep": 5, "layer": 2}])
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


# --- log-likelihood --------------------------------------------------------------------------------------------------


def forced(lm, i: int, answer: str, one: bool = False) -> tuple[float, bool, int]:
    """Mean loss and greediness of an answer, and its length, when `generate()` is made to say it token by token."""
    prompt = lm.prompter.render(user_message(question(i), [picture(i)] if one else pictures_of({"id": i})))
    images = {"images": [prompt.media["image"]]} if prompt.media["image"] else {}
    start = lm.processor(text=prompt.text, **images, return_tensors="pt")
    ids = lm.processor(text=f"{prompt.text} {answer}", **images, return_tensors="pt")["input_ids"][0]
    n = start["input_ids"].shape[1]
    assert ids[:n].tolist() == start["input_ids"][0].tolist()
    steps = lm.model.generate(
        **start,
        do_sample=False,
        suppress_tokens=None,
        max_new_tokens=len(ids) - n,
        prefix_allowed_tokens_fn=lambda row, before: [int(ids[len(before)])],
        output_logits=True,
        return_dict_in_generate=True,
    ).logits
    logits = torch.cat(steps)
    losses = torch.nn.functional.cross_entropy(logits, ids[n:], reduction="none")
    return losses.mean().item(), bool((logits.argmax(-1) == ids[n:]).all()), len(losses)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [{}, {"method": "divprune", "keep": 5}, {"method": "fastv", "keep": 5, "layer": 2}])
def test_log_likelihood_is_that_of_forced_decoding(make, family, method):
    lm = make(family, batch_size=4, **method)
    answers = ["red", "dark green", "yes, it is blue", "7"]
    requests = [ask(i, f" {answer}", kind="loglikelihood") for i in range(4) for answer in answers]
    expected = [forced(lm, i, answer) for i in range(4) for answer in answers]
    assert len({n for _, _, n in expected}) > 2  # answers of one token and of several
    for (loss, greedy), (want, want_greedy, _) in zip(lm.loglikelihood(requests), expected, strict=True):
        assert loss == pytest.approx(want, abs=1e-4)
        assert greedy == want_greedy


@pytest.mark.parametrize("method", [{}, {"method": "divprune", "keep": 5}, {"method": "fastv", "keep": 5, "layer": 2}])
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


# --- prompts ---------------------------------------------------------------------------------------------------------


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


# --- videos ----------------------------------------------------------------------------------------------------------


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


# --- protocols -------------------------------------------------------------------------------------------------------


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


# --- errors ----------------------------------------------------------------------------------------------------------


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


# --- whole runs ------------------------------------------------------------------------------------------------------

TASK = """
task: {name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: q.parquet}}}}
test_split: test
doc_to_visual: !function quiz.images
doc_to_text: question
doc_to_target: answer
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
{rest}
"""
FUNCTIONS = """
def images(doc):
    return [doc["image"]]

def score(doc, results):
    return {"hit": float(results[0].strip() == doc["answer"])}

def messages(doc):
    content = [{"type": "text", "text": "Hello <image>."}, {"type": "image", "url": doc["image"]}]
    return [{"role": "user", "content": content}]
"""
GENERATION = "process_results: !function quiz.score\ngeneration_kwargs: {max_new_tokens: 6, do_sample: false}"


@pytest.fixture(scope="session")
def tasks(folder) -> Path:
    """A directory of task files: quiz, quiz_messages and quiz_choice."""
    path = folder / "tasks"
    path.mkdir()
    questions(path / "q.parquet")
    (path / "quiz.py").write_text(FUNCTIONS)
    (path / "quiz.yaml").write_text(TASK.format(name="quiz", metric="hit", rest=GENERATION))
    messages = GENERATION + "\ndoc_to_messages: !function quiz.messages"
    (path / "quiz_messages.yaml").write_text(TASK.format(name="quiz_messages", metric="hit", rest=messages))
    choice = "output_type: multiple_choice\ndoc_to_choice: choices"
    (path / "quiz_choice.yaml").write_text(TASK.format(name="quiz_choice", metric="acc", rest=choice))
    return path


@pytest.fixture
def evaluate(tasks, monkeypatch, tmp_path):
    """Runs lmms-eval on the test tasks, offline."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    manager = TaskManager("ERROR", include_path=str(tasks), include_defaults=False)

    return partial(run_lmms_eval, manager=manager)


def test_a_run_leaves_a_receipt_and_an_unpatched_model(make, evaluate):
    lm = make(method="random", keep=4, batch_size=4)
    model = lm.model
    results, _ = evaluate(lm, ["quiz", "quiz_choice"])
    assert lm.receipt["kept"] == 4 and lm.receipt["visual_tokens"] == 16 and lm.receipt["had_effect"]
    assert lm.receipt["images"] == 12 + 12  # the choices of a question share a prefill
    assert results["throughput"]["avg_kept"] == 4
    assert results["results"]["quiz_choice"]["acc,none"] is not None
    assert not hasattr(lm, "model")  # lmms-eval lets go of it ...
    again = VlmSlim(model, processor=lm.processor, method="divprune", keep=2)  # ... and it can be used again
    assert again.model is model and "DivPrune" in again.receipt["method"]


def test_answers_of_the_cache_bring_no_receipt(make):
    """A rerun with lmms-eval's `--use_cache` asks the model nothing; zeros would look like a result."""
    model, lines = make(method="divprune", keep=4), []
    sink = logger.add(lines.append, format="{message}")
    assert model.generate_until([]) == []
    model.clean()
    logger.remove(sink)
    assert any("came from lmms-eval's cache" in line for line in lines)
    assert not any(line.startswith("receipt:") for line in lines)


def test_multiple_choice_takes_the_likeliest_choice(make, evaluate):
    lm = make(batch_size=8)
    losses = [[forced(lm, i, colour, one=True)[0] for colour in COLOURS] for i in range(12)]
    results, answers = evaluate(lm, ["quiz_choice"])
    np.testing.assert_allclose([[loss for loss, _ in row] for row in answers["quiz_choice"]], losses, atol=1e-4)
    hits = [np.argmin(row) == i % 4 for i, row in enumerate(losses)]
    assert results["results"]["quiz_choice"]["acc,none"] == pytest.approx(np.mean(hits))
    assert results["results"]["quiz_choice"]["acc_stderr,none"] > 0


def test_messages_that_a_task_builds_are_honoured_by_both_protocols(make, evaluate, monkeypatch):
    prompts, render = [], Prompter.render

    def spy(self, messages):
        prompts.append(render(self, messages))
        return prompts[-1]

    monkeypatch.setattr(Prompter, "render", spy)
    both = [evaluate(make(cls=cls, batch_size=4), ["quiz_messages"])[1] for cls in (VlmSlim, VlmSlimChat)]
    assert both[0] == both[1]
    assert {prompt.text for prompt in prompts} == {"USER: Hello <image>. ASSISTANT:"}


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatched_it_answers_as_the_stock_class(make, evaluate, folder, family, monkeypatch):
    expected = stock_answers(monkeypatch, checkpoint(family, folder), ["quiz"], evaluate.keywords["manager"])
    assert len({answer for (answer,) in expected["quiz"]}) > 5
    for method in ({}, {"method": "uniform", "keep": 1.0}):
        assert evaluate(make(family, batch_size=4, **method), ["quiz"])[1] == expected


# --- command line ----------------------------------------------------------------------------------------------------


def command(*arguments, launcher=("-m",), **env) -> str:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | env
    line = [sys.executable, "-W", "ignore", *launcher, "lmms_eval", *map(str, arguments)]
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def arguments(folder, tasks, *extra) -> list:
    model = f"pretrained={checkpoint('llava', folder)},method=divprune,keep=4"
    return ["--model", "vlmslim", "--model_args", model, "--include_path", tasks, "--batch_size", 4, *extra]


@pytest.mark.slow
def test_the_command_line(folder, tasks, tmp_path):
    names = ["--tasks", "quiz,quiz_choice", "--limit", 5, "--verbosity", "DEBUG", "--output_path", tmp_path]
    out = command(*arguments(folder, tasks, *names), HF_DATASETS_CACHE=str(tmp_path / "cache"))
    assert "quiz_choice" in out and '"kept": 4.0' in out
    assert list(tmp_path.rglob("*results.json"))


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(folder, tasks, tmp_path, make, evaluate):
    # `--cpu` would start a single process; accelerate starts several on a CPU only in this way.
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m"]
    env = {"ACCELERATE_USE_CPU": "true", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    names = ["--tasks", "quiz,quiz_choice", "--limit", 7, "--output_path", tmp_path, "--log_samples"]
    out = command(*arguments(folder, tasks, *names), launcher=launcher, **env)
    assert '"images": 40' in out  # 7 + 28 requests and 1 + 4 that even out the shares, counted over both processes
    expected, answers = evaluate(make(method="divprune", keep=4, batch_size=4), ["quiz", "quiz_choice"], limit=7)
    (file,) = tmp_path.rglob("*_results.json")
    results = json.loads(file.read_text())["results"]
    for name, metric in (("quiz", "hit,none"), ("quiz_choice", "acc,none")):
        assert results[name][metric] == expected["results"][name][metric]
        (file,) = tmp_path.rglob(f"*_samples_{name}.jsonl")
        samples = {s["doc_id"]: s["filtered_resps"] for s in map(json.loads, file.read_text().splitlines())}
        if name == "quiz":
            # lmms-eval logs a list of one answer as the answer
            assert [[samples[i]] if isinstance(samples[i], str) else samples[i] for i in range(7)] == answers[name]
        else:
            losses = [[loss for loss, _ in row] for row in answers[name]]
            np.testing.assert_allclose([[float(loss) for loss, _ in samples[i]] for i in range(7)], losses, atol=1e-4)
