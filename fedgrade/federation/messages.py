"""What the coordinator and a site say to each other: signed documents, with arrays framed behind them.

A frame is ``b"FGM1"``, the envelope's length (four bytes, little-endian), the DSSE envelope, then the arrays as one
safetensors blob whose SHA-256 the signed document states. Nothing is parsed before its size is checked, and nothing
is believed before its signature is.
"""

import struct
from dataclasses import dataclass
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import Field

from fedgrade.aggregation.secure_sum.documents import SumCommitments, SumProposal, SumSurvivors, SumVotes
from fedgrade.errors import MessageRefused
from fedgrade.trust.canonical import digest
from fedgrade.trust.envelope import open_sealed, seal
from fedgrade.trust.identity import PublicKey, SigningKey, SiteId
from fedgrade.trust.records import Purpose

MAX_MESSAGE_BYTES = 2**28
_MAGIC = b"FGM1"
_PREFIX = struct.Struct("<4sI")

Document = TypeVar("Document", "Request", "Reply")
# "spent" and "attempt" ask for a further attempt: this one was charged before, or cannot be gone on with. "waiting" and
# "ledger" are no decision about the job: asking later may help.
RefusalCode = Literal[
    "malformed", "policy", "budget", "stale", "spent", "attempt", "data", "ledger", "model", "waiting"
]


@dataclass(frozen=True, kw_only=True)
class AdmitRequest:
    """Read this sealed job; take part or refuse. Spends nothing.

    ``seen`` is the newest head of the site's own ledger that the coordinator holds, as the site sealed it, or empty if
    it holds none; ``ledger`` is the sealed head of the coordinator's ledger. Either side can tell by them whether the
    other is where it was. They travel here alone: a request for a release must be the same bytes after a crash.
    """

    kind: Literal["admit"] = "admit"
    job_envelope: str
    seen: str
    ledger: str


@dataclass(frozen=True, kw_only=True)
class CommitRequest:
    """Take part in a secure sum on the terms proposed. Spends nothing."""

    kind: Literal["commit"] = "commit"
    proposal: SumProposal


@dataclass(frozen=True, kw_only=True)
class ContributeRequest:
    """Make one release for ``purpose`` from the arrays that travel with this request.

    ``commitments`` are everybody's to the terms of the secure sum in which it leaves; there are none where each release
    leaves as it is.
    """

    kind: Literal["contribute"] = "contribute"
    purpose: Purpose
    round_index: int
    attempt: int
    commitments: SumCommitments | None = None


@dataclass(frozen=True, kw_only=True)
class VoteRequest:
    """Sign whose vectors arrived. Spends nothing."""

    kind: Literal["vote"] = "vote"
    survivors: SumSurvivors


@dataclass(frozen=True, kw_only=True)
class RevealRequest:
    """Every survivor signed the same set: reveal what lets their total be read. Spends nothing."""

    kind: Literal["reveal"] = "reveal"
    votes: SumVotes


Asked = AdmitRequest | CommitRequest | ContributeRequest | VoteRequest | RevealRequest


@dataclass(frozen=True, kw_only=True)
class Request:
    """From the coordinator to one named site, about one job."""

    site: SiteId
    job: str
    body: Annotated[Asked, Field(discriminator="kind")]
    tensors_digest: str


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """The site takes part.

    ``head`` is the sealed head of its ledger as it now stands, and ``consistency`` the proof, in hexadecimal, that
    nothing but entries at its end was added since the head that the coordinator had ``seen``. ``share_key`` is the
    signed key under which other sites encrypt shares to this one, in a job whose secure sums tolerate dropouts.
    ``evaluates`` says whether its held-out items may be asked for as well.
    """

    kind: Literal["admitted"] = "admitted"
    head: str
    consistency: tuple[str, ...]
    share_key: str = ""
    evaluates: bool = True


@dataclass(frozen=True, kw_only=True)
class Committed:
    """The site's signed commitment to the terms proposed."""

    kind: Literal["committed"] = "committed"
    commitment: str


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """The release travels behind this document; ``receipt`` is the signed ledger line that says what it cost.

    ``head`` is the sealed head of the ledger whose last line is that receipt. ``masked`` vouches for a release under
    masks; it is empty where the release leaves as it is.
    """

    kind: Literal["contribution"] = "contribution"
    purpose: Purpose
    round_index: int
    attempt: int
    receipt: str
    head: str
    masked: str = ""


@dataclass(frozen=True, kw_only=True)
class Voted:
    """The site's signed vote for the survivors named."""

    kind: Literal["voted"] = "voted"
    vote: str


@dataclass(frozen=True, kw_only=True)
class Revealed:
    """The shares that the site reveals, signed."""

    kind: Literal["revealed"] = "revealed"
    shares: str


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """The site will not. ``reason`` is for the coordinator's operator and says nothing about photos or labels."""

    kind: Literal["refusal"] = "refusal"
    code: RefusalCode
    reason: str


Said = Admitted | Committed | Contribution | Voted | Revealed | Refusal


@dataclass(frozen=True, kw_only=True)
class Reply:
    """From one site to the coordinator; ``request_digest`` binds it to the exact bytes it answers."""

    site: SiteId
    request_digest: str
    body: Annotated[Said, Field(discriminator="kind")]
    tensors_digest: str


@dataclass(frozen=True, kw_only=True)
class Opened(Generic[Document]):
    """A message that was verified: what was signed, and the arrays' bytes that it vouches for."""

    document: Document
    tensors: bytes


def write_message(document: Request | Reply, *, tensors: bytes, key: SigningKey) -> bytes:
    """The frame that carries ``document``, signed by ``key``, and ``tensors`` behind it."""
    envelope = seal(document, key)
    return _PREFIX.pack(_MAGIC, len(envelope)) + envelope + tensors


def read_message(raw: bytes, *, as_: type[Document], signed_by: PublicKey) -> Opened[Document]:
    """The message in the frame ``raw``, signed by ``signed_by``.

    Raises:
        MessageRefused: not a frame, oversized, or the arrays are not those that were signed for.
        SignatureRefused: not signed by that key.
        DocumentRefused: what was signed is not a document of this kind.
    """
    if len(raw) > MAX_MESSAGE_BYTES:
        raise MessageRefused(f"message: {len(raw)} bytes; the limit is {MAX_MESSAGE_BYTES}")
    if len(raw) < _PREFIX.size:
        raise MessageRefused(f"message: {len(raw)} bytes is too short for a frame")
    magic, length = _PREFIX.unpack_from(raw)
    if magic != _MAGIC or _PREFIX.size + length > len(raw):
        raise MessageRefused("message: not a frame, or cut short")
    envelope, tensors = raw[_PREFIX.size : _PREFIX.size + length], raw[_PREFIX.size + length :]
    document = open_sealed(envelope, as_=as_, signed_by=signed_by)
    if digest(tensors) != document.tensors_digest:
        raise MessageRefused("message: the arrays are not those that were signed for")
    return Opened(document=document, tensors=tensors)
