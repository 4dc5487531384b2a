"""The guest: its operating system, its programs, its workloads and recorded programs.

Guest code is `async def`; every await yields one operation (`penumbra.hw.operations`) to whoever
drives it. Nothing here knows that a VMM exists.
"""
