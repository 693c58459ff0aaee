"""The fault suite: a cluster under load in which everything that can break is broken, on purpose (docs/faults.md)."""
