"""The audit of a receipt finds every kind of lie.

Over every registered method the audit is a part of the contract, in tests/methods/test_contract.py.
"""

from dataclasses import replace

import pytest
from doubles import Both, Halve, Stairs, Strided
from receipt_audit import audited
from tiny import tiny

import vlmslim
from vlmslim.receipt import Receipt


@pytest.mark.parametrize("method", [Both(), Stairs(), [Strided(), Halve()]], ids=str)
def test_every_entry_of_a_receipt_is_true(family, method):
    assert audited(tiny(family), method) == []


# --- planted faults ---------------------------------------------------------------------------------------------------


def wrong_prefill(**edits):
    """Make the receipt note other prefills than there were: field -> its edit."""
    saw_prefill = Receipt.saw_prefill

    def told(self, prefill):
        saw_prefill(self, replace(prefill, **{name: edit(getattr(prefill, name)) for name, edit in edits.items()}))

    return "saw_prefill", told


def wrong_images(**added):
    """Make the receipt note other images than there were: field -> what is added to it."""

    def edit(images):
        return [
            [image._replace(**{name: getattr(image, name) + by for name, by in added.items()}) for image in row]
            for row in images
        ]

    return wrong_prefill(images=edit)


def halved():
    summary = Receipt.summary

    def told(self):
        said = summary(self)
        return said | {"kept": said["kept"] / 2, "kv_bytes": said["kv_bytes"] / 2}

    return "summary", told


def other_settings():
    post_init = Receipt.__post_init__

    def told(self):
        post_init(self)
        self.positions, self.backend, self.dtype = "renumbered", "eager", "bfloat16"

    return "__post_init__", told


def counted_twice():
    saw_prefill = Receipt.saw_prefill

    def told(self, prefill):
        saw_prefill(self, prefill)
        saw_prefill(self, prefill)

    return "saw_prefill", told


FAULTS = {
    "kept": wrong_images(kept=1),
    "tokens": wrong_images(tokens=1),
    "requested": wrong_images(requested=1),
    "sequence": wrong_prefill(sequence=lambda counts: [n - 1 for n in counts]),
    "kv:": wrong_prefill(kv=lambda counts: [n - 1 for n in counts]),
    "text": wrong_prefill(
        text=lambda counts: [n + 1 for n in counts], visual=lambda rows: [[n - 1 for n in row] for row in rows]
    ),
    "timers": wrong_prefill(timers=lambda timers: []),
    "summary of kept": halved(),
    "summary of positions": other_settings(),
    "summary of images": counted_twice(),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_receipt_that_lies_is_found(monkeypatch, name):
    monkeypatch.setattr(Receipt, *FAULTS[name])
    assert any(name in message for message in audited(tiny("llava"), vlmslim.method("uniform", keep=5)))
