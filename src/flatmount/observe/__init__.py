"""Looking at a node: what mounts there are and who makes them, what waits for their locks, and what to do about it."""
