"""What is said of the measurements: cells, statistics, tables, plots and comparisons."""
