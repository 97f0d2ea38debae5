"""Execution over several ranks: groups of ranks, transports of rows between them, layouts and plans.

Letters: P ranks of a group, by position; L of them on one node; N rows to send, M rows received; C classes of
rows (the experts of a destination); D columns; H numbers of a header.
"""
