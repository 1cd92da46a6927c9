"""Container root file systems with a constant number of mounts."""

from flatmount._version import VERSION

__all__ = ["VERSION"]
