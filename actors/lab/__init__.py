"""Experiments: litmus tests, recorded accesses and whole page tables run against the machine."""
