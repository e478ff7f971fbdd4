"""Loaded into a scheduler under test, after its plugin: what nobody claims is given up sooner than after ten seconds."""

from __future__ import annotations

from sllmdask.cluster import adopting
from sllmdask.policy import fleet

adopting.ORPHAN_S = fleet.CLAIM_S = 1.0
