"""CapFilt, the cleaning job (paper, section 3.3): plan, score once, select as often as wanted, export, report."""

__version__ = "0.1.0"
