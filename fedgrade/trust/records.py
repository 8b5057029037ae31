"""What a ledger entry can say. The meaning of a field never changes; a new meaning is a new field or a new kind.

Amounts are integers or exact fractions, never floating-point numbers. Counts of photos or grades never appear: the one
size that does, ``declared_items``, is a number the partner chose to publish.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Final, Literal

from pydantic import Field

from fedgrade.errors import DocumentRefused
from fedgrade.trust.identity import PublicKey, SiteId

Purpose = Literal["centre", "train", "evaluate"]
Partition = Literal["train", "test"]
Unit = Literal["item"]
Adjacency = Literal["add_or_remove_one"]
Composition = Literal["zcdp", "mixed"]

COORDINATOR: Final = SiteId("coordinator")  # the owner of the coordinator's own ledger
UTC_TIME: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}\+00:00")
MAX_REASON: Final = 500  # characters of a correction's
_MAX_TEXTS, _MAX_TEXT = 64, 80
SHA256: Final = re.compile(r"[0-9a-f]{64}")
_NODE_KEY: Final = re.compile(r"ecdsa-sha2-nistp(256|384|521) [A-Za-z0-9+/]{100,300}={0,2}")


@dataclass(frozen=True, kw_only=True)
class DiscreteGaussian:
    """An integer vector of L2 sensitivity ``sensitivity`` was released with discrete Gaussian noise of ``scale``.

    Both in units of the integer grid. Cost: rho = sensitivity² / (2 scale²) of zero-concentrated differential privacy
    (Canonne, Kamath and Steinke 2020, https://arxiv.org/abs/2004.00010, Theorem 4).
    """

    kind: Literal["discrete_gaussian"] = "discrete_gaussian"
    sensitivity: int
    scale: int

    def __post_init__(self) -> None:
        if self.sensitivity < 1 or self.scale < 1:
            raise DocumentRefused(
                f"mechanism: sensitivity {self.sensitivity} and scale {self.scale} must both be at least 1"
            )

    @property
    def rho(self) -> Fraction:
        """Exact cost of one release."""
        return Fraction(self.sensitivity**2, 2 * self.scale**2)


@dataclass(frozen=True, kw_only=True)
class PoissonGaussian:
    """``steps`` Gaussian steps, each on a Poisson sample at ``sampling_rate`` with ``noise_multiplier`` (DP-SGD).

    Abadi et al. (2016), https://arxiv.org/abs/1607.00133. The noise is floating-point, and reports say so.
    ``planned_steps`` are those of the whole job, all of which are paid for with its first release: what is left of a
    job that was stopped in view of its results is not given back.
    """

    kind: Literal["poisson_gaussian"] = "poisson_gaussian"
    sampling_rate: Fraction
    noise_multiplier: Fraction
    steps: int
    planned_steps: int

    def __post_init__(self) -> None:
        if not 0 < self.sampling_rate <= 1:
            raise DocumentRefused(f"mechanism: sampling_rate {self.sampling_rate} must be in (0, 1]")
        if self.noise_multiplier <= 0 or self.steps < 1:
            raise DocumentRefused(
                f"mechanism: noise_multiplier {self.noise_multiplier} and steps {self.steps} must be positive"
            )
        if self.planned_steps < self.steps:
            raise DocumentRefused(
                f"mechanism: planned_steps {self.planned_steps} must be at least the {self.steps} steps of one release"
            )


Mechanism = Annotated[DiscreteGaussian | PoissonGaussian, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True)
class AccountKey:
    """Whose privacy is spent: one unit's in one ingestion cohort of one data lineage of one partner.

    ``partition`` is part of the key because an item is in exactly one for life, so it only ever pays for one.
    Runs and models are not part of it: an item's loss adds up over all of them.
    """

    partner: SiteId
    lineage: str
    cohort: str
    partition: Partition
    unit: Unit = "item"


@dataclass(frozen=True, kw_only=True)
class Genesis:
    """The first entry: whose ledger this is, and which key signs it."""

    kind: Literal["genesis"] = "genesis"
    owner: SiteId
    key: PublicKey
    role: Literal["site", "coordinator"]


@dataclass(frozen=True, kw_only=True)
class DatasetOpened:
    """A data set was put under account, with the partner's ceiling on it.

    ``photos_per_item`` is the bound that the partner declared, not a count. ``manifest_commitment`` is an HMAC of the
    manifest under the partner's own key: it binds, and reveals nothing.
    ``composition`` is fixed for the account's life: ``zcdp`` admits integer noise alone, and all of ``delta`` turns
    rho into epsilon; ``mixed`` also admits Poisson runs, and splits ``delta`` in advance.
    """

    kind: Literal["dataset"] = "dataset"
    lineage: str
    cohort: str
    unit: Unit
    adjacency: Adjacency
    photos_per_item: int
    declared_items: int
    manifest_commitment: str
    composition: Composition
    epsilon_limit: Fraction
    delta: Fraction

    def __post_init__(self) -> None:
        if self.declared_items < 1 or self.photos_per_item < 1:
            raise DocumentRefused(
                f"data set: declared_items {self.declared_items} and photos_per_item {self.photos_per_item} must be "
                "at least 1"
            )
        # Above this, epsilon says little: one item in ten times n could be shown in full.
        if not 0 < self.delta <= Fraction(1, 10 * self.declared_items):
            raise DocumentRefused(
                f"data set: delta {float(self.delta):g} must be above 0 and at most 1/(10 n) = "
                f"{1 / (10 * self.declared_items):.1e} for {self.declared_items} declared items"
            )


@dataclass(frozen=True, kw_only=True)
class Software:
    """What ran at a site, by its own word: fedgrade's version, SHA-256 of its source, versions of libraries by name."""

    fedgrade: str
    source: str
    libraries: dict[str, str]

    def __post_init__(self) -> None:
        texts = (self.fedgrade, *self.libraries, *self.libraries.values())
        if not SHA256.fullmatch(self.source) or len(texts) > _MAX_TEXTS or any(len(text) > _MAX_TEXT for text in texts):
            raise DocumentRefused(
                f"software: source {self.source[:80]!r} must be a SHA-256 in hexadecimal, names and versions at most "
                f"{_MAX_TEXTS} of {_MAX_TEXT} characters"
            )


@dataclass(frozen=True, kw_only=True)
class PlanAccepted:
    """The partner admitted a sealed job; nothing about that job can change afterwards.

    ``accounts`` are those that may be charged for it: a cohort whose budget could not bear the whole job stays out.
    """

    kind: Literal["plan"] = "plan"
    job: str
    job_envelope: str
    mode: Literal["local", "distributed", "local_sgd"]
    participants: int
    accounts: tuple[AccountKey, ...]
    software: Software


@dataclass(frozen=True, kw_only=True)
class Reserve:
    """Privacy was charged, before any photo was read for it. A crash after this leaves the charge standing.

    Each of ``accounts`` pays the whole cost: they are one side of different cohorts, an item is in exactly one of them,
    and so the release costs each item once (parallel composition; McSherry 2009, doi 10.1145/1559845.1559850).

    ``transcript`` is that of the secure sum in which the release leaves under masks (docs/secure-sum.md), and empty
    where it leaves as it is: it stands for everything that all sites of the attempt signed before.
    """

    kind: Literal["reserve"] = "reserve"
    job: str
    round_index: int
    attempt: int
    purpose: Purpose
    accounts: tuple[AccountKey, ...]
    mechanism: Mechanism
    weights_digest: str
    transcript: str = ""
    epsilon_limit: Fraction
    delta: Fraction

    def __post_init__(self) -> None:
        if self.transcript and not SHA256.fullmatch(self.transcript):
            raise DocumentRefused(f"reserve: transcript {self.transcript[:80]!r} must be a SHA-256 in hexadecimal")
        sides = {(one.partner, one.lineage, one.partition, one.unit) for one in self.accounts}
        cohorts = {one.cohort for one in self.accounts}
        if len(sides) != 1 or len(cohorts) != len(self.accounts):
            raise DocumentRefused(
                f"reserve: charges {len(self.accounts)} accounts; they must be one side of one data lineage, each in "
                "another cohort"
            )

    @property
    def partition(self) -> Partition:
        """The side whose items pay."""
        return self.accounts[0].partition


@dataclass(frozen=True, kw_only=True)
class Commit:
    """The reserved release was computed; ``message_digest`` is the SHA-256 of the exact bytes that left."""

    kind: Literal["commit"] = "commit"
    reserve: int
    job: str
    round_index: int
    attempt: int
    purpose: Purpose
    message_digest: str


@dataclass(frozen=True, kw_only=True)
class Abort:
    """The reserved release was given up before anything left. The charge stands: caution is never refunded."""

    kind: Literal["abort"] = "abort"
    reserve: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class LedgerState:
    """Where a ledger stood: how many entries, and the root of the tree over them (RFC 9162), in hexadecimal."""

    entries: int
    root: str

    def __post_init__(self) -> None:
        if self.entries < 1 or not SHA256.fullmatch(self.root):
            raise DocumentRefused(
                f"ledger state: {str(self.entries)[:40]} entries under root {self.root[:80]!r}; at least 1 entry and a "
                "SHA-256 in hexadecimal are expected"
            )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A site saw where the coordinator's ledger stood when it was shown a job.

    ``head`` is the sealed tree head with which the coordinator said so: neither side can invent it, or deny it later.
    """

    kind: Literal["checkpoint"] = "checkpoint"
    owner: SiteId
    head: str


@dataclass(frozen=True, kw_only=True)
class Correction:
    """The partner found that an account had spent more than its ledger says, and put the difference on record.

    It only ever adds: ``rho`` of zero-concentrated differential privacy, for a ``reason`` that a person reads. The
    account may pass its ceiling by it, and then pays for nothing more.
    """

    kind: Literal["correction"] = "correction"
    account: AccountKey
    rho: Fraction
    reason: str

    def __post_init__(self) -> None:
        if self.rho <= 0:
            raise DocumentRefused(f"correction: rho {self.rho} must be above 0; what was spent is never given back")
        if not 1 <= len(self.reason) <= MAX_REASON or not self.reason.isprintable():
            raise DocumentRefused(f"correction: the reason must be 1 to {MAX_REASON} printable characters on one line")


@dataclass(frozen=True, kw_only=True)
class RoundClosed:
    """The coordinator closed a round: which receipts it holds, what the weights were and became.

    ``ledgers`` says where the ledger of each site that is counted stood right after its receipt was written into it.
    """

    kind: Literal["round"] = "round"
    job: str
    round_index: int
    attempt: int
    purpose: Purpose
    receipts: dict[SiteId, str]
    ledgers: dict[SiteId, LedgerState]
    weights_before: str
    weights_after: str


@dataclass(frozen=True, kw_only=True)
class Released:
    """The coordinator published a model.

    ``bundle`` is the digest of the signed index of a bundle in which the release was handed on, and empty where it
    stands by itself. These entries in their order are the registry of releases.
    """

    kind: Literal["release"] = "release"
    job: str
    release_digest: str
    bundle: str = ""

    def __post_init__(self) -> None:
        if self.bundle and not SHA256.fullmatch(self.bundle):
            raise DocumentRefused(f"release: bundle {self.bundle[:80]!r} must be a SHA-256 in hexadecimal")


@dataclass(frozen=True, kw_only=True)
class Enrolled:
    """The coordinator put ``site`` on the roster, or took newer numbers from it: a request by ``key`` asked for that.

    ``node_key`` is the public key of the site's connection, in OpenSSH form. A name and a key belong together for life,
    because budgets hang on the name and the ledger on the key.
    """

    kind: Literal["enrolled"] = "enrolled"
    site: SiteId
    key: PublicKey
    node_key: str
    declared_items: int

    def __post_init__(self) -> None:
        if not _NODE_KEY.fullmatch(self.node_key):
            raise DocumentRefused(f"node key {self.node_key[:80]!r}: an OpenSSH public key on a NIST curve is expected")
        if self.declared_items < 1:
            raise DocumentRefused(f"site {self.site}: declared_items {self.declared_items} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Revoked:
    """The coordinator took ``site`` off the roster, for good; what it contributed before stands."""

    kind: Literal["revoked"] = "revoked"
    site: SiteId
    key: PublicKey
    reason: str

    def __post_init__(self) -> None:
        if not 1 <= len(self.reason) <= MAX_REASON or not self.reason.isprintable():
            raise DocumentRefused(f"revocation: the reason must be 1 to {MAX_REASON} printable characters on one line")


Body = Annotated[
    Genesis
    | DatasetOpened
    | PlanAccepted
    | Reserve
    | Commit
    | Abort
    | Correction
    | Checkpoint
    | RoundClosed
    | Released
    | Enrolled
    | Revoked,
    Field(discriminator="kind"),
]
