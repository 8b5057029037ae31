"""What a compliance officer hands to a regulator: one page of HTML, made from verified ledgers alone.

Knows only what :mod:`fedgrade.federation` proves. Needs no network, no display, neither torch nor Flower.
"""

from fedgrade.report.privacy import RosterSource, privacy_report, write_report

__all__ = ["RosterSource", "privacy_report", "write_report"]
