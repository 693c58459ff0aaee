"""The traffic manager: which flow travels in which class, how each fabric is told, and whether it was told (docs/traffic.md)."""
