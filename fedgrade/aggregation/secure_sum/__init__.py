"""Sites add up integer vectors so that the coordinator learns the total alone. Protocol: docs/secure-sum.md.

:class:`~fedgrade.aggregation.secure_sum.site.SumSite` and
:class:`~fedgrade.aggregation.secure_sum.coordinator.SumCoordinator` are state machines that take and return documents.
They know no network, no clock, no ledger and no photo; a job's are driven by federation/sum_conversation.py and
federation/sum_desk.py.
"""
