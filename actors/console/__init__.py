"""The command line.

Reading order: `main` (what can be asked), `config` (what a run is made of), `workloads` (what a
name stands for), `execute` (one run and its folder), `workers` (several, in processes), `run` and
`compare` (the commands), `tables` (how results look); `trace` and `listing` stand alone.
"""
