"""Ratios, each measured in one run: `python -m bench [SECTION...]`, as root."""
