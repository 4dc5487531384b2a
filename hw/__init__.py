"""Passive hardware: memory, paging formats, MMU, TLB, interrupts, costs and the CPU engines.

Nothing here waits, and nothing here knows that a guest OS or a VMM exists.
"""
