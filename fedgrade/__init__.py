"""fedgrade: condition grading, trained by competitors who never pool a photo.

The rooms, from the top down; imports only ever go down this list:

- :mod:`fedgrade.cli` — the command line; the doors in ``clients/`` and ``server/`` add their commands to it.
- :mod:`fedgrade.report` — what a ledger says, drawn for people.
- :mod:`fedgrade.federation` — one site that answers, one loop that asks.
- :mod:`fedgrade.job` — a training job: all the specs, sealed.
- :mod:`fedgrade.full_batch`, :mod:`fedgrade.training`, :mod:`fedgrade.evaluation`, :mod:`fedgrade.aggregation` — the
  mathematics of a round.
- :mod:`fedgrade.data`, :mod:`fedgrade.model`, :mod:`fedgrade.privacy` — photos, weights, guarantees.
- :mod:`fedgrade.trust` — bytes that can be believed: strict documents, keys, envelopes, ledgers.
- :mod:`fedgrade.grading`, :mod:`fedgrade.errors` — the scale, and what can go wrong.
"""

__version__ = "0.1.0"
