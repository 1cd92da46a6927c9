"""Images on disk: layers, the flat trees made of them, and who uses which."""

from flatmount.store.importing import Progress, Progressed
from flatmount.store.model import (
    Holder,
    Owners,
    Removed,
    RootAttributes,
    StoredImage,
    StoredLayer,
)
from flatmount.store.store import Store

__all__ = [
    "Holder",
    "Owners",
    "Progress",
    "Progressed",
    "Removed",
    "RootAttributes",
    "Store",
    "StoredImage",
    "StoredLayer",
]
