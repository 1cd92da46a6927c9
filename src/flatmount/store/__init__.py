"""Images on disk: layers, the flat trees made of them, and who uses which."""

from flatmount.store.catalogue import Catalogue
from flatmount.store.costs import Costs, FlatCost, LayerCost, Usage
from flatmount.store.fsck import Checked, Finding, Part
from flatmount.store.importing import Progress, Progressed
from flatmount.store.model import (
    FlatForm,
    Holder,
    Owners,
    Removed,
    RootAttributes,
    StoredImage,
    StoredLayer,
)
from flatmount.store.origins import Origins
from flatmount.store.repair import Repair
from flatmount.store.store import Store

__all__ = [
    "Catalogue",
    "Checked",
    "Costs",
    "Finding",
    "FlatCost",
    "FlatForm",
    "Holder",
    "LayerCost",
    "Origins",
    "Owners",
    "Part",
    "Progress",
    "Progressed",
    "Removed",
    "Repair",
    "RootAttributes",
    "Store",
    "StoredImage",
    "StoredLayer",
    "Usage",
]
