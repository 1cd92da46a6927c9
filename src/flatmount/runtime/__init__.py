"""Containers: from an image and a request to a running process, and everything until it is removed."""
