"""Images as they arrive: documents, archives, layers. Reading and verifying; nothing is written here."""

from flatmount.image.layer import LayerStream
from flatmount.image.model import Descriptor, ImageConfig, Index, Manifest, Platform
from flatmount.image.source import ImageSource, image_names, open_source
from flatmount.image.tar import TarReader

__all__ = [
    "Descriptor",
    "ImageConfig",
    "ImageSource",
    "Index",
    "LayerStream",
    "Manifest",
    "Platform",
    "TarReader",
    "image_names",
    "open_source",
]
