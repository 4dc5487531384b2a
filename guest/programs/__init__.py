"""Guest programs: what a process runs, and the two kinds of it (coroutines, recordings)."""
