"""Comparing fingerprints over another channel: the one step of enrolment that no signature can take over."""

import sys

import click

from fedgrade.errors import DocumentRefused, SignatureRefused
from fedgrade.trust.identity import PublicKey


def require_fingerprint(key: PublicKey, *, given: str | None, whose: str) -> None:
    """Return if ``key`` is the one whose fingerprint ``whose`` told over another channel.

    Args:
        key: what the paper at hand names.
        given: the fingerprint as it was told; without it, the person at the terminal is shown the key's and asked.
        whose: in words, for the question and the refusal.

    Raises:
        SignatureRefused: it is another key's.
        DocumentRefused: nothing was given, and there is no terminal to ask at.
        click.Abort: the person said no.
    """
    if given is not None:
        if not key.has_fingerprint(given):
            raise SignatureRefused(
                f"fingerprint {given[:80]!r}: the key here is {key.fingerprint}; this is not from {whose}, or was "
                "replaced on its way"
            )
        return
    if not sys.stdin.isatty():
        raise DocumentRefused(
            f"fingerprint {key.fingerprint}: compare it with {whose} by phone or in person, then give --fingerprint"
        )
    click.echo(f"Fingerprint: {key.fingerprint}")
    click.confirm(f"Is this, to the last digit, what {whose} reads to you over another channel?", abort=True)
