"""Published measurements beside what this machine says: calibration, rows, cells."""
