"""The only door to the kernel: executor, probes, user namespaces, mount table."""
