"""What is said of the samples.

`cells.py` gathers them into the rows of results.json, with intervals by `statistics.py`. `tables.py` writes results.md
and has `plots.py` draw (numbers shown by `units.py`); `comparison.py` pairs two runs question by question,
and `side_by_side.py` shows them.
"""

from peft_longlora.eval.report.cells import Cell, collect_cells
from peft_longlora.eval.report.comparison import Difference, compare
from peft_longlora.eval.report.tables import make_report

__all__ = ["Cell", "Difference", "collect_cells", "compare", "make_report"]
