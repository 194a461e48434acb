"""What a run found out about its rows: kept over time, shown on a page, and as lists of rows to act on.

Needs ``pip install 'torch-molere[report]'``; :mod:`torch_molere` itself does not import it.
"""

from torch_molere.report.findings import LabelIssues, hard_rows, harmful_rows, label_issues, sampling_weights, without
from torch_molere.report.recorder import Recorder, Run

__all__ = [
    "LabelIssues",
    "Recorder",
    "Run",
    "hard_rows",
    "harmful_rows",
    "label_issues",
    "sampling_weights",
    "without",
]
