"""vLLM with the plug-in against transformers with vlmslim. scripts/test_vllm.sh makes an environment for them."""

import gc
import json
import logging
import shutil
from types import SimpleNamespace

import pytest

vllm = pytest.importorskip("vllm", reason="scripts/test_vllm.sh makes an environment with vLLM")

from vllm_table import Questions, engine, expected, served  # noqa: E402, after the check for vLLM

from vlmslim import bundled

pytestmark = pytest.mark.vllm


@pytest.fixture
def start():
    """Starts engines, and lets go of them at the end."""
    started = []

    def made(*args, **options):
        started.append(engine(*args, **options))
        return started[-1]

    yield made
    started.clear()
    gc.collect()


@pytest.mark.parametrize(
    ("checkpoint", "method"),
    [
        ("tiny-llava", "divprune:keep=64"),
        ("tiny-llava", "todre:keep=64:layer=None"),
        ("tiny-llava", "visionzip:keep=64:mode=released"),
        ("tiny-llava", "tokenflex:keep=64:weights=bundled/tiny-tokenflex"),
        ("tiny-llava-next", "globalcom2:keep=64"),
        ("tiny-llava-next", "tokencorr:keep=0.25"),
        ("tiny-llava-next", "divprune:keep=64:positions=original"),
    ],
)
def test_answers_are_those_of_transformers(start, checkpoint, method):
    questions = Questions.of(checkpoint)
    answers, tokens = served(start(checkpoint, method), questions.prompts, questions.images)
    assert answers == expected(checkpoint, method, questions.prompts, questions.images)
    whole = 144 if checkpoint == "tiny-llava" else 200
    assert max(tokens) < whole


@pytest.mark.parametrize("positions", ["renumbered", "original"])
def test_chunked_prefill_and_caches_change_nothing(start, positions):
    questions = Questions.of("tiny-llava")
    method = f"divprune:keep=64:positions={positions}"
    llm = start("tiny-llava", method, max_num_batched_tokens=40, max_num_seqs=8)  # cuts through an image's 64 tokens
    wanted = expected("tiny-llava", method, questions.prompts, questions.images)
    assert served(llm, questions.prompts, questions.images)[0] == wanted
    assert served(llm, questions.prompts, questions.images)[0] == wanted  # from the caches


def test_a_runner_that_asks_for_positions_after_encoding_gets_the_same(start):
    """The runners of GPUs do; the CPU's does not, so the flag that they set is set here."""
    questions, method = Questions.of("tiny-llava"), "divprune:keep=64:positions=original"
    llm = start("tiny-llava", method, max_num_batched_tokens=40, max_num_seqs=8)
    llm.llm_engine.model_executor.driver_worker.worker.model_runner.is_multimodal_pruning_enabled = True
    wanted = expected("tiny-llava", method, questions.prompts, questions.images)
    assert served(llm, questions.prompts, questions.images)[0] == wanted


@pytest.mark.parametrize("positions", ["renumbered", "original"])
def test_two_pictures_in_a_prompt(start, positions):
    questions, method = Questions.of("tiny-llava"), f"divprune:keep=64:positions={positions}"
    pairs = [[a, b] for a, b in zip(questions.images[::2], questions.images[1::2], strict=True)]
    prompts = [p.replace("<image>", "<image>\n<image>") for p in questions.prompts[::2]]
    assert served(start("tiny-llava", method), prompts, pairs)[0] == expected("tiny-llava", method, prompts, pairs)


def test_a_budget_above_the_tokens_of_a_picture_fails_that_request_alone(start):
    questions = Questions.of("tiny-llava-next")
    llm = start("tiny-llava-next", "divprune:keep=400")
    sizes = {}
    for i, image in enumerate(questions.images):
        sizes.setdefault(image.size, i)
    outcomes = set()
    for i in sizes.values():
        try:
            (answer,), (tokens,) = served(llm, [questions.prompts[i]], [questions.images[i]])
            assert tokens > 400
            outcomes.add("answered")
        except ValueError as error:
            assert "larger than the image" in str(error)
            outcomes.add("refused")
    small = questions.images[0].resize((96, 96))
    with pytest.raises(ValueError, match="larger than the image"):
        served(llm, [questions.prompts[0]], [small])
    assert outcomes


def test_what_vllm_cannot_do_stops_the_engine_at_its_start():
    with pytest.raises(ValueError, match="inside the decoder"):
        engine("tiny-llava", "fastv:keep=64")
    with pytest.raises(ValueError, match="positions='kept'"):
        engine("tiny-llava", "divprune:keep=64:positions=kept")
    with pytest.raises(Exception, match="144 visual tokens"):
        engine("tiny-llava", "divprune:keep=200")
    with pytest.raises(Exception, match="enable_tower_connector_lora"):
        engine("tiny-llava", "divprune:keep=64", enable_lora=True, enable_tower_connector_lora=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_part_that_was_trained_for_another_checkpoint_is_refused(ranks, tmp_path, capfd):
    """Under tensor parallelism too, where no rank has whole weights after loading."""
    shutil.copytree(bundled.resolve("bundled/tiny-tokenflex"), tmp_path, dirs_exist_ok=True)
    described = json.loads((tmp_path / "vlmslim.json").read_text())
    signature = described["base"]["signature"]
    signature["projector.weight"] = [-x for x in signature["projector.weight"]]
    (tmp_path / "vlmslim.json").write_text(json.dumps(described))
    parallel = {} if ranks == 1 else dict(tensor_parallel_size=2, distributed_executor_backend="mp")
    with pytest.raises(Exception) as refused:  # an engine with workers says that one failed; the worker's log, why
        engine("tiny-llava", f"tokenflex:keep=64:weights={tmp_path}", **parallel)
    assert "projector.weight by 200%" in str(refused.value) + "".join(capfd.readouterr())


def test_pipeline_parallelism_is_refused():
    """An engine would raise it in a worker, and its own error does not say why."""
    from vlmslim.vllm.models import SlimLlava

    two = SimpleNamespace(pipeline_parallel_size=2)
    config = SimpleNamespace(model_config=SimpleNamespace(hf_config=None), lora_config=None, parallel_config=two)
    with pytest.raises(ValueError, match="use tensor_parallel_size"):
        SlimLlava(vllm_config=config)


def test_the_log_tells_what_was_kept(start, caplog):
    questions = Questions.of("tiny-llava")
    llm = start("tiny-llava", "divprune:keep=64")
    logger = logging.getLogger("vllm.vlmslim")
    logger.addHandler(caplog.handler)
    llm.llm_engine.model_executor.driver_worker.worker.model_runner.model.slim_receipt.told = float("-inf")
    served(llm, questions.prompts[:1], questions.images[:1])
    logger.removeHandler(caplog.handler)
    assert "visual tokens in" in caplog.text
    assert "(44.4 %)" in caplog.text


@pytest.mark.parametrize("method", ["todre:keep=64:layer=None", "divprune:keep=64:positions=original"])
def test_two_ranks_choose_alike(start, method):
    """Tensor parallelism spreads the heads, by whose attention ToDRE chooses its pivot, over ranks."""
    questions = Questions.of("tiny-llava")
    llm = start("tiny-llava", method, tensor_parallel_size=2, distributed_executor_backend="mp")
    wanted = expected("tiny-llava", method, questions.prompts, questions.images)
    assert served(llm, questions.prompts, questions.images)[0] == wanted
