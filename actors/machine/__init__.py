"""Drivers: the task actors of a virtual machine and what they do with an exit."""
