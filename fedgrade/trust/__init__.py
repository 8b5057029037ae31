"""Bytes that can be believed: strict documents, identities, signed envelopes, and the ledger that cannot be rewritten.

Knows nothing of photos, models or Flower; a compliance laptop needs no more than this to verify.
"""
