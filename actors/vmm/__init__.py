"""Passive parts of the monitor: memory management, write traces, shadow pages, exits, schemes."""
