"""Container root file systems with a constant number of mounts."""

from flatmount._version import VERSION as __version__

__all__ = ["__version__"]
