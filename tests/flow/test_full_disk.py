import resource
from contextlib import contextmanager

import pytest

from fedgrade.federation.messages import Admitted, Contribution, Refusal
from fedgrade.federation.site_proof import prove_site
from fedgrade.federation.store import write_durably
from tests.federation.small_federation import NAMES, ask

ADMITTED = ["genesis", "dataset", "plan", "checkpoint"]  # what a ledger says once a job was admitted
SITE = NAMES[0]


@contextmanager
def full_disk(path, *, room):
    """No file can grow beyond the size of ``path`` and ``room`` bytes: what a full disk does to an append."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 1, 200, 800])
def test_a_full_disk_at_the_reservation_charges_nothing_and_the_next_attempt_succeeds(federation, room, caplog):
    job, ledger = federation.job(), federation.ledger(SITE)
    question = federation.question(job, ask("train"))
    with federation.site() as site:
        site.answer(federation.admission(job))
        before = ledger.read_bytes()
        with full_disk(ledger, room=room):
            body = federation.opened(site.answer(question)).document.body
        assert isinstance(body, Refusal)
        assert body.code == "ledger"
        # The reason names a path of the partner's machine, so it stays in the partner's own log.
        assert "nothing was charged" in caplog.text
        assert str(ledger) not in body.reason
        assert ledger.read_bytes() == before
        assert federation.opened(site.answer(question)).document.body.kind == "contribution"
    assert len(federation.charges(SITE)) == 1
    assert "ledger" in caplog.text
    assert prove_site(ledger, site=SITE, roster=federation.roster).entries == len(ADMITTED) + 2
    assert [entry.body.kind for entry in federation.entries(SITE)] == [*ADMITTED, "reserve", "commit"]


def test_a_full_disk_at_admission_leaves_a_ledger_that_verifies(federation):
    job, ledger = federation.job(), federation.ledger(SITE)
    with federation.site() as site:
        with full_disk(ledger, room=100):
            body = federation.opened(site.answer(federation.admission(job))).document.body
        assert (body.kind, body.code) == ("refusal", "ledger")
        assert isinstance(federation.opened(site.answer(federation.admission(job))).document.body, Admitted)
    assert prove_site(ledger, site=SITE, roster=federation.roster).entries == len(ADMITTED)
    assert [entry.body.kind for entry in federation.entries(SITE)] == ADMITTED


def test_a_disk_that_fills_between_reservation_and_reply_keeps_the_charge_and_sends_nothing(federation):
    """The outbox cannot hold the reply, so it could not be repeated, so it must not leave."""
    job, ledger = federation.job(), federation.ledger(SITE)
    with federation.site() as site:
        site.answer(federation.admission(job))
        with full_disk(ledger, room=8000):
            body = federation.opened(site.answer(federation.question(job, ask("train")))).document.body
        assert (body.kind, body.code) == ("refusal", "ledger")
        assert len(federation.charges(SITE)) == 1
        lost = federation.opened(site.answer(federation.question(job, ask("train")))).document.body
        assert (lost.kind, lost.code) == ("refusal", "spent")
        again = federation.opened(site.answer(federation.question(job, ask("train", 0, 1)))).document.body
    assert isinstance(again, Contribution)
    assert len(federation.charges(SITE)) == 2
    assert list((federation.folder(SITE) / "outbox").glob("*.part")) == []


def test_a_document_for_which_there_is_no_room_leaves_the_old_one_and_nothing_beside_it(tmp_path):
    path = tmp_path / "document.json"
    write_durably(path, b"old")
    with full_disk(path, room=100), pytest.raises(OSError, match="File too large"):
        write_durably(path, b"new" * 1000)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
