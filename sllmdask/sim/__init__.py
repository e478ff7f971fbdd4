"""The same controller under a virtual clock."""
