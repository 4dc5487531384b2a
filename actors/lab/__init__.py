"""Experiments on machines: what many runs of one guest show together."""
