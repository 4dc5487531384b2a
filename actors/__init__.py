"""Everything that runs on the event loop, and the passive parts it asks.

Floors, top down: console; lab; machine; vmm | guest | coherent | processes;
hw | core | check | observe | runtime.
"""
