"""What a plan may rely on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What the probes found on this host for one file system (flatmount.kernel.probes). False: absent, or not known."""

    idmapped_mounts: bool = False
    idmapped_layers: bool = False
    idmapped_upper: bool = False
    lowerdir_append: bool = False
    layer_descriptors: bool = False
    detached_layers: bool = False
    open_tree_attr: bool = False
    statmount: bool = False
    mount_events: bool = False
    erofs_files: bool = False
    erofs_devices: bool = False

    @property
    def erofs(self) -> bool:
        """Whether an EROFS image can be mounted, from its file or through a loop device."""
        return self.erofs_files or self.erofs_devices
