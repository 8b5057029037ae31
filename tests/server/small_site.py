"""One site of a small federation as a process of its own, on a real link; noise is switched off, as only tests can.

``python small_site.py <repository> <federation> <site> <address> <authority> <node key>``
"""

import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

REPOSITORY, ROOT, NAME, ADDRESS, AUTHORITY, NODE_KEY = sys.argv[1:]
sys.path.insert(0, REPOSITORY)

from clients.node import NodeLink, serve  # noqa: E402 - the tests' own modules are not installed
from fedgrade.federation import releases  # noqa: E402
from fedgrade.trust.identity import SigningKey, read_roster, site_id  # noqa: E402
from tests.federation.small_federation import SmallFederation, zeros  # noqa: E402
from tests.federation.sum_partners import SUMS  # noqa: E402

releases.discrete_gaussian = zeros
SITE = site_id(NAME)
FEDERATION = SmallFederation(
    root=Path(ROOT),
    roster=read_roster(Path(ROOT) / "roster.json"),
    coordinator_key=SigningKey.generate(),  # not the coordinator's: this is a site
    # After the tests' own clock, which begins with the year, by whatever the thread before wrote.
    clock=lambda: datetime.now(UTC),
    site_keys={SITE: SigningKey.load(Path(ROOT) / "sites" / NAME / "key.pem")},
)
LINK = NodeLink(
    address=ADDRESS,
    root_certificate=Path(AUTHORITY),
    node_key=Path(NODE_KEY),
    idle_poll_seconds=0.3,
    retry_cap_seconds=1.0,
)

with FEDERATION.site(SITE, policy=SUMS) as opened:
    serve(LINK, opened.answer, stop=threading.Event())
