"""Modules that reports import late and slowly; processes that are forked from one with them start faster."""

import importlib

for _name in ("pretrain.comparison.report.page", "matplotlib.backends.backend_svg", "scipy.stats"):
    importlib.import_module(_name)


def nothing() -> None:
    """Be called on a rank: the process that forks ranks then imports this module (parallel/testing.py)."""
