"""Root file systems: image, store, strategy and executor put together, and their undoing."""

from flatmount.rootfs.assemble import assemble
from flatmount.rootfs.assembler import Assembler, Request, Rootfs
from flatmount.rootfs.ranges import RangePool

__all__ = ["Assembler", "RangePool", "Request", "Rootfs", "assemble"]
