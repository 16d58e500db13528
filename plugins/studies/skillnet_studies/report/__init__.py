"""Reports of comparisons: tables, plots, files and an HTML page."""
