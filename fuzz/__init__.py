"""Fuzz targets; `make fuzz` runs them, the tests replay their corpus."""
