"""Many models for the membership attack, each by the code that a site and a coordinator run: nothing rebuilt.

One site answers every stage of a job in mode ``local`` with :func:`compute_release`, the bytes are read as the
coordinator reads them, and the coordinator's own step follows. Nobody else answers, so that no other noise helps:
what is attacked is worth exactly the privacy that this one site was charged for.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context

import numpy as np
import numpy.typing as npt

from fedgrade.federation import releases, rounds
from fedgrade.federation.exchange import Received
from fedgrade.federation.gathered import Gathered
from fedgrade.federation.payloads import Head, read_release
from fedgrade.federation.releases import SiteRows, compute_release
from fedgrade.job import JobSpec, TrainingJob, plan_job
from fedgrade.model.head import head_inputs
from fedgrade.privacy.plan import LocalSpec
from fedgrade.trust.identity import SiteId
from fedgrade.trust.records import LedgerState

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

SITE = SiteId("site-a")
NOWHERE = LedgerState(entries=1, root="0" * 64)
_SILENT = (SiteId("site-b"), SiteId("site-c"))
_BEYOND_EVERY_GRADIENT = 4.0  # of unit features, three thresholds and a bias: at most 1.81 long
_ANY_EPSILON = 8.0


@dataclass(frozen=True, kw_only=True)
class Items:
    """Items of one photo each: features [items, dimensions] and grades [items]."""

    features: npt.NDArray[np.float32]
    grades: IntArray


@dataclass(frozen=True, kw_only=True)
class Shadow:
    """One model to be trained: on which items, and at which epsilon; None for no noise and no clip."""

    spec: JobSpec
    epsilon: float | None
    items: Items
    members: BoolArray


def job_at(spec: JobSpec, epsilon: float | None, *, declared: int) -> TrainingJob:
    """``spec`` in mode ``local`` at ``epsilon``; without one, a job whose clip no gradient reaches."""
    if not isinstance(spec.privacy, LocalSpec):
        raise TypeError("shadow models are trained in mode local")
    privacy = replace(spec.privacy, target_epsilon=epsilon or _ANY_EPSILON)
    if epsilon is None:
        privacy = replace(privacy, max_grad_norm=_BEYOND_EVERY_GRADIENT)
    return plan_job(
        replace(spec, privacy=privacy), declared_items=dict.fromkeys((SITE, *_SILENT), declared), nonce="shadow"
    )


def confidences(shadows: list[Shadow]) -> FloatArray:
    """What each of ``shadows`` says of every item [models, items]; trained side by side, one processor each."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return np.stack(list(pool.map(confidence, shadows)))


def confidence(shadow: Shadow) -> FloatArray:
    """One trained model's logit of the likelihood of each item's true grade [items]: exp(-loss), as odds."""
    head, items = trained(shadow), shadow.items
    margins = head_inputs(items.features, head.centre) @ head.thresholds.T
    above = items.grades[:, None] > np.arange(head.thresholds.shape[0])
    loss = np.logaddexp(0.0, np.where(above, -margins, margins)).sum(axis=1)
    return np.asarray(-np.log(np.expm1(np.clip(loss, 1e-9, 700.0))))


def trained(shadow: Shadow) -> Head:
    """The head that a job trains on the members of ``shadow``, from the first release to the last step."""
    chosen, items = shadow.members, shadow.items
    job = job_at(shadow.spec, shadow.epsilon, declared=len(items.grades) // 2)
    rows = SiteRows(
        features=items.features[chosen].astype(np.float64),
        item_index=np.arange(int(chosen.sum())),
        grades=items.grades[chosen],
    )
    with noise_of(shadow.epsilon):
        state = rounds._start(job)
        for stage in rounds.stages_of(job)[:-1]:  # all but the evaluation, which sees other items
            head = rounds._head(job, state, stage)
            raw = compute_release(job, stage.purpose, head, site=SITE, rows=lambda _: rows)
            release = read_release(raw, job, stage.purpose, site=SITE)
            # Receipts and ledgers are for what is charged, which no model depends on.
            received = Received(release=release, receipt=b"", ledger=NOWHERE, tensors=raw)
            gathered = Gathered(result=release, attempt=0, received={SITE: received})
            state = rounds._advance(job, state, stage, gathered)
    return rounds._final_head(job, state)


@contextmanager
def noise_of(epsilon: float | None) -> Iterator[None]:
    """The site's own noise; none at all without an epsilon, which no job can ask for."""
    honest = releases.discrete_gaussian
    if epsilon is None:
        releases.discrete_gaussian = _silence
    try:
        yield
    finally:
        releases.discrete_gaussian = honest


def _silence(size: int, *, scale: int) -> IntArray:
    del scale
    return np.zeros(size, dtype=np.int64)
