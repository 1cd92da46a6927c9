"""Results in; text for a terminal and pages for a browser out. Knows result types only."""
