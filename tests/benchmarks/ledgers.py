"""What a ledger of a hundred thousand entries costs: to write, to read with every signature, and to prove.

Entries are real ones, signed and chained: charges of one account and their receipts. Only the disk is spared, because
a hundred thousand waits for it would measure the disk.
"""

import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from fractions import Fraction
from itertools import islice
from pathlib import Path

from fedgrade.trust.identity import SigningKey, SiteId
from fedgrade.trust.ledger import LedgerWriter, read_ledger
from fedgrade.trust.records import AccountKey, Commit, DiscreteGaussian, Reserve

ENTRIES = 100_000
SITE = SiteId("site-a")
NOW = datetime(2026, 1, 1, tzinfo=UTC)
ACCOUNT = AccountKey(partner=SITE, lineage="panels", cohort="2026", partition="train")


def ledger() -> str:
    """Microseconds an entry and the memory that reading adds."""
    key = SigningKey.generate()
    with tempfile.TemporaryDirectory(prefix="fedgrade-bench-") as folder:
        path = Path(folder) / "ledger.jsonl"
        with _no_waiting_for_the_disk(), LedgerWriter.open(path, key=key, observe=lambda *_: None) as writer:
            writer.start(owner=SITE, role="site", now=NOW)
            written = _seconds(lambda: _write(writer))
            proved = _seconds(lambda: writer.tree.consistency(older=ENTRIES // 3))
        read = _seconds(lambda: sum(1 for _ in read_ledger(path, key=key.public)))
        few, many = (_peak(path, key=key, entries=entries) for entries in (ENTRIES // 20, ENTRIES // 4))
        size = path.stat().st_size
    lines = ["| what | seconds for all | microseconds an entry |", "|---|---|---|"]
    for what, seconds in (("sign, chain and write", written), ("read, every signature checked", read)):
        lines.append(f"| {what} | {seconds:.1f} | {seconds / ENTRIES * 1e6:.0f} |")
    memory = (
        f"Reading is streamed: at its peak it holds {few:.1f} MiB for {ENTRIES // 20:,} entries and {many:.1f} MiB for "
        f"{ENTRIES // 4:,}."
    )
    head = f"{ENTRIES:,} entries, {size / 2**20:.0f} MiB. {memory}"
    proof = f"A proof that the ledger only grew since a third of it: {1000 * proved:.2f} ms."
    return "\n".join([head, "", *lines, "", proof])


def _write(writer: LedgerWriter) -> None:
    mechanism = DiscreteGaussian(sensitivity=2**20, scale=10_123_457)
    for place in range(ENTRIES // 2):
        reserve = Reserve(
            job="a" * 64, round_index=place, attempt=0, purpose="train", accounts=(ACCOUNT,), mechanism=mechanism,
            weights_digest="b" * 64, epsilon_limit=Fraction(8), delta=Fraction(1, 10**5),
        )  # fmt: skip
        sequence = writer.append(reserve, now=NOW).sequence
        writer.append(
            Commit(
                reserve=sequence, job="a" * 64, round_index=place, attempt=0, purpose="train", message_digest="d" * 64
            ),
            now=NOW,
        )


def _peak(path: Path, *, key: SigningKey, entries: int) -> float:
    """The most memory, in MiB, that reading the first ``entries`` takes."""
    tracemalloc.start()
    try:
        for _ in islice(read_ledger(path, key=key.public), entries):
            pass
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@contextmanager
def _no_waiting_for_the_disk() -> Iterator[None]:
    real, os.fsync = os.fsync, lambda _: None
    try:
        yield
    finally:
        os.fsync = real
