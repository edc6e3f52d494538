"""Ranks of one node, through shared memory."""
