"""Everything that runs on the event loop, and the passive parts it asks.

Floors, top down: console; machine; vmm | guest; hw | core | check | observe | runtime.
"""
