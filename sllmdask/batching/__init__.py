"""What runs in the next step of one instance. Plain Python: no I/O, no clock, no torch; the simulator uses it too."""
