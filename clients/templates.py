"""``site.yaml`` and ``policy.yaml`` as a partner first gets them, a comment a line. The only place that spells them.

What is written here is read back by the strict decoder before it reaches a disk, so that no value can smuggle in a key.
"""

import json
import re
from dataclasses import dataclass
from typing import Final

from clients.settings import SiteSettings
from fedgrade.data.manifest import SYNTHETIC_CEILING
from fedgrade.errors import DocumentRefused
from fedgrade.federation.policy import Policy
from fedgrade.trust.canonical import decode_yaml

# YAML takes these as they stand; anything else is quoted, numbers and words with a meaning included.
_PLAIN: Final = re.compile(r"[A-Za-z_./][A-Za-z0-9_./-]*")
_WORDS: Final = frozenset({"true", "false", "null"})

_SITE: Final = """\
# A partner's node. Paths start from the folder of this file; keep it outside any checkout, readable by its user alone.
site: {site}{s_site}# your name on the coordinator's roster, for life
key: key.pem                    # signs all that this site says; never leaves this machine
roster: {roster}{s_roster}# who is who; `fedgrade site join` writes it
policy: policy.yaml             # your own ceilings: nothing a coordinator sends can widen them
photos: {photos}{s_photos}# folder that the manifests' paths start from
lineage: {lineage}{s_lineage}# names this data set for life; budgets hang on it
cohorts:                        # batches in which items came in, each with its own budget; new items, new cohort
  {cohort}:
    manifest: {manifest}{s_manifest}# one row a photo; see docs/partner.md
    declared_items: {declared_items}{s_declared_items}# the number of training items that you choose to publish
photos_per_item: {photos_per_item}{s_photos_per_item}# the most photos of one item; a bound you choose, not a count
ledger: ledger.jsonl            # append-only; back it up with ledger.jsonl.members, never restore an older copy
outbox: outbox                  # sent replies: a question asked twice gets the same bytes
cache: {cache}{s_cache}# extracted features, as sensitive as the photos
backbones: {backbones}{s_backbones}# exported public backbones
threads: {threads}{s_threads}# for extracting features on the CPU
device: auto                    # auto, cpu, cuda or cuda:N; auto takes the first GPU, if there is one
socket: run/agent.sock          # where `fedgrade site status` finds the running node
link:
  address: {address}{s_address}# of the coordinator; `fedgrade site join` writes it
  root_certificate: ca.pem      # the coordinator's authority; `fedgrade site join` writes it
  node_key: node_key            # EC P-384, for the transport alone
"""

_POLICY: Final = """\
# This partner's own ceilings. Nothing that a coordinator sends can widen them.
modes: [{modes}]            # privacy modes it takes part in
epsilon_limit: {epsilon_limit}          # per account, over all jobs there will ever be
delta: 1.0e-5               # at which the limit is measured
epsilon_per_job: {epsilon_per_job}        # the most that one job may plan to spend
maximum_rounds: 500         # of one job
maximum_attempts: 3         # of one round; each is charged
minimum_participants: {minimum_participants}     # with fewer, the sum says too much about each
minimum_items: {minimum_items}           # with fewer of one's own, stay out
backbones: [{backbones}]    # networks it runs
grades: {grades}            # the labels it grades by, best to worst; other jobs are refused
synthetic_ceiling: {synthetic_ceiling}      # largest share of synthetic photos in its own training data
releases: [centre, train, evaluate]   # what its items may be asked for; without evaluate it is not measured on
coordinators: []            # fingerprints of coordinators it works for; none named, the one of its roster
hours: ""                   # when it answers, by this machine's clock, as 20:00-06:00; empty for always
approval: false             # whether a person must approve each job: fedgrade site approve
"""


@dataclass(frozen=True, kw_only=True)
class SiteValues:
    """What differs between partners in a ``site.yaml``. Paths as they shall be written."""

    site: str
    photos: str
    lineage: str
    cohort: str
    manifest: str
    declared_items: int
    photos_per_item: int
    threads: int = 2
    cache: str = "cache"
    backbones: str = "backbones"
    roster: str = "roster.json"
    address: str = ""


@dataclass(frozen=True, kw_only=True)
class PolicyValues:
    """What a partner chooses first in its ``policy.yaml``."""

    modes: tuple[str, ...]
    epsilon_limit: float
    epsilon_per_job: float
    backbones: tuple[str, ...]
    grades: tuple[str, ...]
    minimum_participants: int = 3
    minimum_items: int = 50


def site_yaml(values: SiteValues) -> str:
    """A ``site.yaml`` that says ``values``.

    Raises:
        DocumentRefused: they are no site's settings.
    """
    texts = {
        name: scalar(value) if isinstance(value, str) else str(value)
        for name, value in vars(values).items()
        if name != "address"
    }
    texts["address"] = quoted(values.address)
    # Comments begin in one column wherever the value leaves room for that.
    fill = {f"s_{name}": " " * max(1, _room(name) - len(text)) for name, text in texts.items()}
    text = _SITE.format(**texts, **fill)
    decode_yaml(SiteSettings, text.encode(), what="site file")
    return text


def policy_yaml(values: PolicyValues) -> str:
    """A ``policy.yaml`` that says ``values``.

    Raises:
        DocumentRefused: they are no partner's policy.
    """
    text = _POLICY.format(
        modes=", ".join(map(scalar, values.modes)),
        backbones=", ".join(map(scalar, values.backbones)),
        epsilon_limit=float(values.epsilon_limit),
        epsilon_per_job=float(values.epsilon_per_job),
        minimum_participants=values.minimum_participants,
        minimum_items=values.minimum_items,
        grades=json.dumps(list(values.grades), ensure_ascii=False),
        synthetic_ceiling=SYNTHETIC_CEILING,
    )
    decode_yaml(Policy, text.encode(), what="policy")
    return text


def scalar(text: str) -> str:
    """``text`` as YAML: plain where that is safe, quoted otherwise.

    Raises:
        DocumentRefused: it holds characters that no file of ours should: line breaks, control codes.
    """
    return text if _PLAIN.fullmatch(text) and text not in _WORDS else quoted(text)


def quoted(text: str) -> str:
    """``text`` between quotes, as YAML and JSON both read it.

    Raises:
        DocumentRefused: it holds characters that no file of ours should: line breaks, control codes.
    """
    if not text.isprintable():
        raise DocumentRefused(f"{text[:80]!r}: printable characters on one line are expected")
    return json.dumps(text, ensure_ascii=False)


def _room(name: str) -> int:
    """Columns between the start of the value of ``name`` and where comments begin."""
    indent = {"manifest": 4, "declared_items": 4, "address": 2}.get(name, 0)
    return 32 - indent - len(name) - len(": ")
