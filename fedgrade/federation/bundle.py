"""A released model as a folder to hand on: the release, an ONNX file, a card, receipts, and a signed list of it all.

``index.json``, sealed by the coordinator, names every file with its digest, and the release before. Whoever opens a
bundle gets verified bytes or an error; nothing is read twice, no link is followed, and no file may be there that the
index does not name. Needs neither torch nor Flower nor onnx.
"""

import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from fedgrade.errors import DocumentRefused, FedgradeError, LedgerBroken, SignatureRefused
from fedgrade.federation.release import DOCUMENT, MAX_BYTES, WEIGHTS, OpenedRelease, open_release, opened_from
from fedgrade.federation.store import write_durably
from fedgrade.trust.canonical import MAX_DOCUMENT_BYTES, digest
from fedgrade.trust.envelope import open_sealed, seal
from fedgrade.trust.identity import PublicKey, Roster, SigningKey, SiteId
from fedgrade.trust.ledger import MAX_ENTRY_BYTES, open_receipt
from fedgrade.trust.records import SHA256, Commit

INDEX: Final = "index.json"
ONNX: Final = "model.onnx"
CARD: Final = "card.html"
RECEIPTS: Final = "receipts"

_ALWAYS: Final = frozenset({DOCUMENT, WEIGHTS, ONNX, CARD})
_RECEIPTS_OF: Final = re.compile(r"receipts/([a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)\.jsonl")


@dataclass(frozen=True, kw_only=True)
class BundledFile:
    """SHA-256 and size of one file."""

    digest: str
    size: int

    def __post_init__(self) -> None:
        if not SHA256.fullmatch(self.digest) or not 0 <= self.size <= MAX_BYTES:
            raise DocumentRefused(
                f"bundle: a file of {self.size} bytes and digest {self.digest[:80]!r}; a SHA-256 and at most "
                f"{MAX_BYTES} bytes are expected"
            )

    @classmethod
    def of(cls, content: bytes) -> "BundledFile":
        """What the index says of a file with this ``content``."""
        return cls(digest=digest(content), size=len(content))


@dataclass(frozen=True, kw_only=True)
class ReleaseIndex:
    """What the coordinator signs of a bundle.

    ``release`` is the digest of ``release.json``; ``previous`` that of the release before it of the same federation and
    asset type, empty for the first. ``files`` are all files of the bundle but the index itself, by their paths.
    """

    schema: Literal["fedgrade/bundle/1"] = "fedgrade/bundle/1"
    release: str
    previous: str
    asset_type: str
    files: dict[str, BundledFile]

    def __post_init__(self) -> None:
        if self.previous and not SHA256.fullmatch(self.previous):
            raise DocumentRefused(f"bundle: previous {self.previous[:80]!r} must be a SHA-256 in hexadecimal")
        strange = [name for name in self.files if name not in _ALWAYS and not _RECEIPTS_OF.fullmatch(name)]
        missing = sorted(_ALWAYS - self.files.keys())
        if strange or missing:
            wrong = f"{strange[0][:80]!r} has no place in it" if strange else f"{missing[0]!r} is missing"
            raise DocumentRefused(f"bundle: {wrong}; it is {sorted(_ALWAYS)} and receipts/<site>.jsonl")
        if self.files[DOCUMENT].digest != self.release:
            raise DocumentRefused(f"bundle: {DOCUMENT} in its list of files is not the release that it names")


@dataclass(frozen=True, kw_only=True)
class OpenedBundle:
    """A bundle of which the signature and every byte were verified.

    Attributes:
        index: what was signed.
        digest: of the sealed index: what the coordinator's ledger knows the bundle by.
        release: the model.
        model: the ONNX file, not yet run.
        receipts: each counted site's lines, not yet opened; see :func:`require_receipts`.
    """

    index: ReleaseIndex
    digest: str
    release: OpenedRelease
    model: bytes
    receipts: dict[SiteId, tuple[bytes, ...]]


def write_bundle(
    contents: Mapping[str, bytes],
    *,
    index: ReleaseIndex,
    folder: Path,
    key: SigningKey,
    record: Callable[[str], None],
) -> str:
    """Make ``folder`` the bundle of ``contents``, by their paths, and ``index``; returns the sealed index's digest.

    Guarantee: the folder appears whole or not at all. ``record`` is called with that digest when everything is on disk
    and before the folder has its name: what it raises leaves nothing behind.

    Raises:
        DocumentRefused: there is something at ``folder``, or it cannot be written.
    """
    require_room(folder)
    sealed = seal(index, key)
    if len(sealed) > MAX_DOCUMENT_BYTES:
        raise DocumentRefused(f"bundle: its index takes {len(sealed)} bytes; the limit is {MAX_DOCUMENT_BYTES}")
    making = folder.absolute().with_name(f".{folder.absolute().name}.{secrets.token_hex(4)}")
    try:
        (making / RECEIPTS).mkdir(parents=True)
        for name, content in {**contents, INDEX: sealed}.items():
            write_durably(making / name, content)
        record(digest(sealed))
        making.rename(folder.absolute())
    except OSError as error:
        raise DocumentRefused(f"bundle {folder}: cannot be written ({error.strerror}); publish again") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return digest(sealed)


def require_room(folder: Path) -> None:
    """Return if nothing is at ``folder``, or an empty folder.

    Raises:
        DocumentRefused: there is something; a bundle is never written over another.
    """
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise DocumentRefused(f"bundle {folder}: exists and is not overwritten; give another folder")


def open_bundle(folder: Path, *, signed_by: PublicKey) -> OpenedBundle:
    """The bundle in ``folder``, signed by ``signed_by``, with exactly the files that were signed for.

    Raises:
        DocumentRefused, SignatureRefused, ModelRefused: it is not such a bundle; nothing of it may be used.
    """
    where = f"bundle {folder}"
    sealed = _read(folder, INDEX, limit=MAX_DOCUMENT_BYTES)
    try:
        index = open_sealed(sealed, as_=ReleaseIndex, signed_by=signed_by, what=f"{where}: {INDEX}")
    except SignatureRefused as error:
        raise SignatureRefused(f"{where}: {INDEX}: {error}") from error
    found = set(_files(folder))
    if different := sorted(found ^ {INDEX, *index.files}):
        what = "is not in its signed index" if different[0] in found else "is missing"
        raise DocumentRefused(f"{where}: {different[0]!r} {what}; get the bundle again")
    contents = {name: _expected(folder, name, file) for name, file in index.files.items()}
    release = opened_from(contents[DOCUMENT], contents[WEIGHTS], signed_by=signed_by, what=where)
    if release.release.job.spec.data.asset_type != index.asset_type:
        raise DocumentRefused(f"{where}: its index says {index.asset_type[:80]!r}, its release another asset type")
    receipts = {SiteId(match[1]): name for name in contents if (match := _RECEIPTS_OF.fullmatch(name))}
    return OpenedBundle(
        index=index,
        digest=digest(sealed),
        release=release,
        model=contents[ONNX],
        receipts={site: tuple(contents[name].splitlines()) for site, name in receipts.items()},
    )


def open_model(folder: Path, *, signed_by: PublicKey) -> OpenedRelease:
    """The release in ``folder``, which may be a bundle; then the whole bundle is verified first.

    Raises:
        DocumentRefused, SignatureRefused, ModelRefused: it is neither.
    """
    if os.path.lexists(folder / INDEX):
        return open_bundle(folder, signed_by=signed_by).release
    return open_release(folder, signed_by=signed_by)


def require_receipts(bundle: OpenedBundle, roster: Roster) -> tuple[SiteId, ...]:
    """Return if the receipts are those of everyone that the release counts, each signed by its site.

    Returns the sites that are not on ``roster``, whose signatures could therefore not be checked.

    Raises:
        LedgerBroken: a receipt is missing, is for another job, stands twice, or is not by its site.
    """
    counted = bundle.release.release.contributions
    if different := sorted(bundle.receipts.keys() ^ counted.keys()):
        raise LedgerBroken(f"bundle: receipts of {different[0]} do not go with what its release counts")
    for site, lines in bundle.receipts.items():
        if len(lines) != counted[site]:
            raise LedgerBroken(f"bundle: {len(lines)} receipts of {site}; its release counts {counted[site]}")
        if site in roster.sites:
            _require_by(site, lines, key=roster.key_of(site), job=bundle.release.release.job.digest)
    return tuple(sorted(set(bundle.receipts) - set(roster.sites)))


def _require_by(site: SiteId, lines: tuple[bytes, ...], *, key: PublicKey, job: str) -> None:
    places = set()
    for number, line in enumerate(lines, start=1):
        where = f"bundle: receipt {number} of {site}"
        try:
            body = open_receipt(line, key=key).body
        except FedgradeError as error:
            raise LedgerBroken(f"{where}: {error}") from error
        if not isinstance(body, Commit) or body.job != job:
            raise LedgerBroken(f"{where}: is not for this job")
        places.add((body.purpose, body.round_index))
    if len(places) != len(lines):
        raise LedgerBroken(f"bundle: two receipts of {site} are for one round")


def receipt_lines(folder: Path, site: SiteId) -> bytes:
    """The receipts of ``site`` that the coordinator counted in the job folder ``folder``, a line a stage.

    Raises:
        DocumentRefused: one cannot be read.
    """
    lines = [
        _read(path.parent, path.name, limit=MAX_ENTRY_BYTES) for path in sorted((folder / RECEIPTS / site).iterdir())
    ]
    return b"".join(line + b"\n" for line in lines)


def _files(folder: Path) -> Iterator[str]:
    """Paths of all files in ``folder`` and in its one folder of receipts.

    Raises:
        DocumentRefused: a link, a device or any other folder is there.
    """
    for inside in ("", RECEIPTS):
        if inside and not (folder / inside).is_dir():
            continue
        with os.scandir(folder / inside) as entries:
            for entry in entries:
                name = f"{inside}/{entry.name}" if inside else entry.name
                if entry.is_file(follow_symlinks=False):
                    yield name
                elif name != RECEIPTS or not entry.is_dir(follow_symlinks=False):
                    raise DocumentRefused(f"bundle {folder}: {name!r} is no plain file; get the bundle again")


def _expected(folder: Path, name: str, file: BundledFile) -> bytes:
    content = _read(folder, name, limit=file.size)
    if BundledFile.of(content) != file:
        raise DocumentRefused(f"bundle {folder}: {name} is not the file that was signed for; get the bundle again")
    return content


def _read(folder: Path, name: str, *, limit: int) -> bytes:
    path = folder / name
    try:
        # Opened once, and looked at only then: what lies there may change, and a pipe would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise DocumentRefused(f"bundle {folder}: {name} cannot be read ({error.strerror})") from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            raise DocumentRefused(f"bundle {folder}: {name} is no plain file of at most {limit} bytes")
        return file.read(limit + 1)
