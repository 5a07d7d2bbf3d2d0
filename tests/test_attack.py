"""The attacks of `scripts/analysis/attack.py`: a small part of them, and that they can fail."""

import signal

import attack as attacks
import pytest

import vlmslim.options.check

FEW = {"options": 60, "yaml": 60, "results": 25, "saved": 25, "command": 15, "kills": 2}


@pytest.mark.parametrize("kind", attacks.ATTACKS)
def test_no_try_ends_badly(kind):
    counts, found = attacks.attack(kind, seed=1, tries=FEW[kind])
    assert found == []
    assert sum(counts.values()) == FEW[kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", attacks.ATTACKS)
def test_no_try_of_many_ends_badly(kind):
    counts, found = attacks.attack(kind, seed=2)
    assert found == [] and counts["clear"] + counts["works"] == attacks.ATTACKS[kind].tries


def test_ten_thousand_tries_are_made():
    assert sum(kind.tries for kind in attacks.ATTACKS.values()) >= 10_000


def test_a_check_that_is_gone_is_noticed(monkeypatch):
    monkeypatch.setattr("vlmslim.compressor.check_options", lambda *_: None)
    counts, found = attacks.attack("options", seed=1, tries=60)
    assert counts["accepted"] + counts["traceback"] == len(found) > 0
    assert vlmslim.options.check.fits(1, int)


def raises(error):
    def strike():
        raise error

    return strike


@pytest.mark.parametrize(
    ("strike", "outcome"),
    [
        (lambda: None, "works"),
        (raises(ValueError("give 3")), "clear"),
        (raises(ValueError("")), "traceback"),
        (raises(KeyError("x")), "traceback"),
        (raises(attacks.Bad("lost", "all")), "lost"),
        (lambda: signal.raise_signal(signal.SIGPROF), "hang"),
    ],
)
def test_outcomes(strike, outcome):
    assert attacks.outcome_of(strike)[0] == outcome


def test_the_table_adds_up():
    counts = {kind: attacks.Counter({"works": 2, "clear": 3}) for kind in attacks.ATTACKS}
    last = attacks.table(counts).splitlines()[-1]
    assert [cell.strip() for cell in last.strip("|").split("|")] == ["all", "30", "12", "18", "0", "0", "0", "0"]
