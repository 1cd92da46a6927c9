"""Is it this node's mounts? What was seen (state), what follows from it (checks), and what to do (findings, pages)."""
