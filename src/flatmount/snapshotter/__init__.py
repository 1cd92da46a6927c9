"""The containerd snapshot service: root file systems with one mount each for the engine that nodes already have."""
