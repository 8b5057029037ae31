"""What a guarantee costs and who pays: plans, budgets, accounting, and exact noise.

Plans, budgets and accounting run on a compliance laptop without torch; only :mod:`fedgrade.privacy.noise` needs OpenDP.
"""
