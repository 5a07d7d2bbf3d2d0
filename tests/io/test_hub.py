"""The hub without a network: refused within seconds, in a sentence; and nothing bundled asks it."""

import socket
import time

import pytest
from huggingface_hub import constants

from vlmslim.evaluation.config import load_config
from vlmslim.evaluation.errors import ConfigError
from vlmslim.evaluation.preflight import describe_checkpoint
from vlmslim.evaluation.schema import ModelConfig
from vlmslim.io import hub
from vlmslim.loading import load
from vlmslim.methods._clip import load_clip


@pytest.fixture
def no_network(monkeypatch):
    """Makes every attempt to find or reach another machine fail, and lists them."""
    asked = []

    def lookup(host, *_, **__):
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    def connect(_, address):
        asked.append(address)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    hub._answers.cache_clear()
    yield asked
    hub._answers.cache_clear()


@pytest.mark.parametrize(
    ("kind", "ask"),
    [
        (ConfigError, lambda name: describe_checkpoint(ModelConfig(pretrained=name))),
        (OSError, load),
        (OSError, load_clip),
    ],
)
def test_a_hub_id_without_a_network_says_what_to_do_at_once(no_network, monkeypatch, kind, ask):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)  # the hub's client would wait between its attempts
    with pytest.raises(kind, match="nobody/nothing is not on this machine, and .* does not answer: give the folder"):
        ask("nobody/nothing")
    assert sum(waited) < 1 and len(no_network) <= 2  # our question, and one that the hub's client asks by itself


def test_a_name_server_that_never_answers_is_not_waited_for(no_network, monkeypatch):
    monkeypatch.setattr(hub, "SECONDS", -1.0)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(1))
    assert hub.is_unreachable()


def test_the_switch_for_working_offline_is_named(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.how_to_ask() == {"local_files_only": True}
    assert "nobody/nothing is not on this machine, and HF_HUB_OFFLINE is set" in hub.hint("nobody/nothing")


def test_an_answer_of_any_kind_is_an_answer(monkeypatch):
    class Session:
        def head(self, *_, **__):
            return "404"

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_session", Session)
    hub._answers.cache_clear()
    assert hub.how_to_ask() == {} and hub.hint("a/b") == ""
    hub._answers.cache_clear()


def test_what_is_bundled_asks_no_network(no_network, tmp_path):
    pytest.importorskip("lmms_eval")
    from vlmslim.evaluation.run import run

    (tmp_path / "c.yaml").write_text(
        "model: {pretrained: bundled/tiny-llava, device: cpu}\ntasks: [scenes_colour]\nbudgets: [16]\n"
        "baselines: false\nmethods: [divprune, {method: recoverable, clip: bundled/tiny-clip, keep: 16}]\n"
        f"limit: 1\ntiming: null\noutput: {tmp_path / 'out'}\n"
    )
    assert len(run(load_config(tmp_path / "c.yaml")).rows) == 3
    assert no_network == []
