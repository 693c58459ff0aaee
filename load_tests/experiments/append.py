"""JCT as the appended lengths grow, all else equal (paper section 7.2).

More appended tokens mean more to compute per byte read, so the gain falls as storage stops being what limits.
`--require` bounds the dual-path modes' gain over Basic at every length.
"""

from __future__ import annotations

from dataclasses import replace

from load_tests.experiments.experiment import Say, Setup
from load_tests.experiments.measure import Load
from load_tests.experiments.scaling import FACTORS, QUICK, SETUP, ScalingResult, load_name, run_scaling

__all__ = ["QUICK", "SETUP", "run"]


def run(setup: Setup, say: Say) -> ScalingResult:
    loads = [Load(replace(setup.workload, append_scale=factor), load_name(factor)) for factor in FACTORS]
    return run_scaling("append", setup, loads, say)
