"""What the system tells about itself: `tracing` (one trace per request), `metrics` (every number, in one module) and `logs`."""
