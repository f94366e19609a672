import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")    # models are tiny: a second thread costs more than it brings, where others work forty times more
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

_faults = []    # (fault, times tried, times that something was lost)


@pytest.fixture
def record_fault():
    """record_fault(fault, tried, lost): a row of the table that `python -m pytest -m long` ends with."""
    return lambda fault, tried, lost=0: _faults.append((fault, tried, lost))


def pytest_terminal_summary(terminalreporter):
    if _faults:
        terminalreporter.write_line("\n| fault | tried | lost |\n|---|---|---|")
        for row in _faults:
            terminalreporter.write_line("| " + " | ".join(map(str, row)) + " |")
