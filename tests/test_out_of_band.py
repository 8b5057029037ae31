"""What a person at a terminal is shown and asked when a key is compared over another channel."""

import io
import sys

import click
import pytest

from fedgrade.cli.out_of_band import require_fingerprint
from fedgrade.errors import DocumentRefused, SignatureRefused
from tests.trust.small_ledger import KEY, OTHER


class Terminal(io.StringIO):
    """Somebody who types at a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def typing(monkeypatch):
    return lambda text: monkeypatch.setattr(sys, "stdin", Terminal(text))


@pytest.mark.parametrize("yes", ["y\n", "yes\n"])
def test_a_person_who_compared_and_says_yes_is_believed(typing, capsys, yes):
    typing(yes)
    require_fingerprint(KEY.public, given=None, whose="north")
    shown = capsys.readouterr().out
    assert f"Fingerprint: {KEY.public.fingerprint}" in shown
    assert "what north reads to you" in shown


@pytest.mark.parametrize("no", ["n\n", "\n", ""])
def test_anything_but_a_yes_is_a_no(typing, no):
    typing(no)
    with pytest.raises(click.Abort):
        require_fingerprint(KEY.public, given=None, whose="north")


def test_without_a_terminal_the_fingerprint_must_be_given(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(DocumentRefused, match=KEY.public.fingerprint):
        require_fingerprint(KEY.public, given=None, whose="north")


def test_a_fingerprint_that_was_given_is_compared_and_nobody_is_asked(typing):
    typing("y\n")
    require_fingerprint(KEY.public, given=KEY.public.fingerprint.upper().replace(" ", ":"), whose="north")
    for wrong in (OTHER.public.fingerprint, "", KEY.public.fingerprint[:-5]):
        with pytest.raises(SignatureRefused, match="this is not from north"):
            require_fingerprint(KEY.public, given=wrong, whose="north")
