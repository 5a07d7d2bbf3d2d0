"""The server with the plug-in: API server, engine core and worker as processes of their own."""

import base64
import io
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

pytest.importorskip("vllm", reason="scripts/test_vllm.sh makes an environment with vLLM")

from vllm_table import Questions, wide  # noqa: E402, after the check for vLLM

from vlmslim.vllm import overrides

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a server with DivPrune at 200 tokens, and the file with its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    words = ["--model", wide("tiny-llava-next"), "--served-model-name", "tiny"]
    words += ["--host", "127.0.0.1", "--port", str(port)]
    given = overrides("divprune", "llava_next", keep=200, positions="renumbered")
    words += ["--hf-overrides", json.dumps(given)]
    words += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]
    words += ["--kv-cache-memory-bytes", str(1 << 28)]
    with open(log, "w") as file:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait(address, process, log)
        yield address, log
    finally:
        process.terminate()
        process.wait(60)


def _wait(address, process, log):
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"{address}/health")
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(log.read_text()[-3000:])


def ask(address, image, text):
    """One chat request with a picture: the answer, and the tokens of the prompt."""
    data = io.BytesIO()
    image.save(data, "png")
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 12}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    reply = json.load(urllib.request.urlopen(request))
    return reply["choices"][0]["message"]["content"].strip(), reply["usage"]["prompt_tokens"]


def test_chat_requests_are_answered_from_short_prompts(server):
    address, log = server
    questions = Questions.of("tiny-llava-next")
    answered = 0
    for i in range(0, len(questions.prompts), 6):
        text = questions.prompts[i].partition("<image>\n")[2].removesuffix(" ASSISTANT:")
        answer, tokens = ask(address, questions.images[i], text)
        answered += bool(answer)
        assert 200 < tokens < 300
    assert answered == 4
    assert "visual tokens in" in log.read_text()


def test_a_budget_above_the_tokens_of_a_picture_is_an_error_of_that_request(server):
    address, _ = server
    small = Questions.of("tiny-llava-next").images[0].resize((96, 9))
    with pytest.raises(urllib.error.HTTPError, match="400") as refused:
        ask(address, small, "what is this ?")
    assert "keep=200 is larger than the image" in refused.value.read().decode()
    assert urllib.request.urlopen(f"{address}/health").status == 200


def test_the_server_stays_up_after_a_wrong_request(server):
    address, _ = server
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}).encode()
    request = urllib.request.Request(f"{address}/v1/chat/completions", body, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)
    assert urllib.request.urlopen(f"{address}/health").status == 200
