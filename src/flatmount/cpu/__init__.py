"""Processors: topology, what a contended lock costs on them, what a burst of containers costs, and what would help."""
