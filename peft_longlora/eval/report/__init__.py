"""Reports made from samples.

`cells.py` gathers samples into the rows of results.json, with intervals from `statistics.py`. `tables.py` writes
results.md and calls `plots.py` (`units.py` formats numbers); `comparison.py` pairs two runs question by question,
and `side_by_side.py` shows them. `layers.py` draws how far layers attend. `style.py` is shared by all plots.
"""

from peft_longlora.eval.report.cells import Cell, collect_cells
from peft_longlora.eval.report.comparison import Difference, compare
from peft_longlora.eval.report.tables import make_report

__all__ = ["Cell", "Difference", "collect_cells", "compare", "make_report"]
