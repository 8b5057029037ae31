"""Which sources are for training and which for testing, drawn by keyed hash.

Photos of one physical source resemble each other more than they resemble the next source: same camera, same light and
material. A split by photo puts near-copies on both sides and overstates what the model will do on a new source: on
ELPV, quadratic weighted kappa .656 by photo against .492 by module. So sources are dealt, never photos.

The draw is made once, when the data enters, and written into the manifest; it holds for the life of the data. Training
and test items have separate privacy accounts, and an item that changed sides would have spent from both.
"""

import hashlib
import hmac
from collections.abc import Collection

from fedgrade.data.manifest import Split
from fedgrade.errors import DataRefused

MIN_KEY_BYTES = 16


def assign_splits(
    sources: Collection[str], *, key: bytes, test_fraction: float, tied: Collection[frozenset[str]] = ()
) -> dict[str, Split]:
    """A side for each of ``sources``, the same whatever order they are named in.

    Args:
        sources: names of the physical sources.
        key: secret of the partner; without it nobody can steer a source to one side by its name.
        test_fraction: share of the sources to test on, between 0 and 1; rounded, but at least one source (or one tied
            set) stays on each side if there are two.
        tied: sets of sources that must stay together, because they may be one and the same.

    Raises:
        DataRefused: the key is short, the fraction is out of range, or a tied source is not among ``sources``.
    """
    if len(key) < MIN_KEY_BYTES:
        raise DataRefused(f"split key: {len(key)} bytes; at least {MIN_KEY_BYTES} are needed")
    if not 0 < test_fraction < 1:
        raise DataRefused(f"test_fraction: {test_fraction}; choose a share between 0 and 1")
    groups = keyed_order(sources, key=key, tied=tied)
    wanted = max(1, round(test_fraction * sum(len(group) for group in groups)))
    sides: dict[str, Split] = {}
    for group in groups:
        # The last group always trains: a site with a single source has nothing to test on, but can still learn.
        tests = len(sides) < wanted and group is not groups[-1]
        sides.update(dict.fromkeys(sorted(group), Split.TEST if tests else Split.TRAIN))
    return sides


def keyed_order(
    sources: Collection[str], *, key: bytes, tied: Collection[frozenset[str]] = ()
) -> tuple[frozenset[str], ...]:
    """``sources`` in groups, the tied ones together, ordered by HMAC-SHA256 under ``key`` (RFC 2104).

    Raises:
        DataRefused: a tied source is not among ``sources``.
    """
    groups = {source: frozenset([source]) for source in sources}
    for together in tied:
        if unknown := together - groups.keys():
            raise DataRefused(f"tied source {min(unknown)!r} is not one of the sources")
        merged = frozenset().union(*(groups[source] for source in together))
        groups.update(dict.fromkeys(merged, merged))
    # A group goes by its first name, so that its place does not depend on which of its members is met first.
    return tuple(sorted(set(groups.values()), key=lambda group: hmac.digest(key, min(group).encode(), hashlib.sha256)))
