"""For all tests: hypothesis gives examples as much time as they take; machines that test are busy with other things, too."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# As workers have it, and before OpenMP is loaded: threads that spin take the cores from the tests that run beside.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
