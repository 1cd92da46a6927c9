"""A page for each finding: what it is, how it is seen, what it does to a node, and what to do."""

from __future__ import annotations

PAGES: dict[str, str] = {
    "per-layer-assembly": """\
A process id-maps every layer of an image by itself while it makes a container's root file system: open_tree,
mount_setattr and move_mount for each layer, overlayfs over the results, and an umount for each. A container of L layers
makes about 4L mount operations, all under locks that the whole machine shares (namespace_sem, mount_lock), and every
umount waits for an RCU grace period.

Seen by: the system call events of a second; three or more id-mapped mounts for each new file system.
Do: use an engine that id-maps the layers' common parent (containerd 2.0.7, 2.1.5, 2.2 or later), or flatmount, which
attaches nothing for layers. `flatmount trace --engine containerd --layers 5,50` shows whether the count grows.""",
    "mount-storm": """\
Somebody attaches and detaches more than a hundred mounts a second, in whatever mount namespace. The locks are the same
for all namespaces of a machine, and everybody who follows a mount table reads it again.

Seen by: the system call events of a second. Nobody's fault by itself: fifty containers started at once do it.
Do: start fewer at a time, or lower the number of operations of a start: `flatmount storm` compares.""",
    "leaked-mounts": """\
Temporary mounts that an engine makes for milliseconds while it assembles a root file system are still there a second
later. Their umount failed (EBUSY, or the engine was killed), or a mount namespace that was copied meanwhile holds a
copy. They never go by themselves, lengthen the table, and keep layers from being deleted. Deleting a directory in which
one is still mounted deletes the layer's files.

Seen by: two looks at the tables of all mount namespaces, a second apart.
Do: `flatmount leaks` names each with who holds it; `flatmount leaks --clean` takes them off by umount alone, in this
table and in the namespaces that hold a copy. A copy that is locked there (its namespace belongs to a user namespace)
goes with the processes in it. What containerd works on a layer in (containerd-mount*) is named after ten minutes and
never taken off: restart containerd, which does it when it starts.
See: containerd issues 12139 and 13893, moby issue 34672.""",
    "table-large": """\
A mount table with thousands of mounts. Each container start copies it (1.4 to 1.9 us for each mount, while locks are
held), the end of a mount namespace takes it apart under a spinning lock, and whoever follows it reads and parses all of
it at each change: 2 ms for a thousand mounts, 25 ms for ten thousand, 150 ms for fifty thousand.

Seen by: the table of this namespace; owners are told from where a mount is.
Do: find out whose they are (the evidence says), and what makes them: on Kubernetes nodes it is mostly volumes.""",
    "mount-max": """\
The kernel refuses further mounts in a mount namespace at fs.mount-max (100,000 by default), with ENOSPC, which engines
report as "no space left on device".

Do: raise it for now (sysctl fs.mount-max), and find out who mounts so much.""",
    "propagation-loop": """\
A directory was bind-mounted again and again with shared propagation: each mount made below one of
them is made below all. The table then grows with the square of what is mounted, or faster.

Seen by: eight or more mounts of one directory in one peer group.
Do: take off the spare ones, then make the bind mount private, or guard the script that makes it with `mountpoint -q`.
See: mount_namespaces(7), Documentation/filesystems/sharedsubtree.rst.""",
    "init-busy": """\
PID 1 (systemd) follows the mount table to make a unit of each mount. After every burst of changes it reads and parses
the whole table. On a node with thousands of mounts it then has no time for what else it is asked for.

Seen by: PID 1's processor time over a second.
Do: make fewer mounts in the host's table. systemd 248 and later limits how often it reads; libmount 2.42 and a kernel
with fanotify mount events (6.15) end it. See: systemd issues 31137 and 33186.""",
    "watcher-busy": """\
A process has a mount table open, and uses a tenth of a processor or more. It reads the whole table at each change, or
again and again without one.

Seen by: open descriptors of mountinfo, mounts or mountstats, and the processor time over a second. The time may have
another reason: `perf top -p PID` tells.
Do: ask its maker to limit its rate, or to use mount events.""",
    "containerd-per-layer": """\
containerd 2.0.0 to 2.0.6 and 2.1.0 to 2.1.4 id-map each layer by itself when a container has a user namespace: 4L + 5
mounts and unmounts for L layers. An unmount that fails is not tried again.

Do: update to 2.0.7, 2.1.5, 2.2 or later. See: containerd issues 12048 and 12092.""",
    "containerd-table-parse": """\
containerd 2.3 and later look every assembly's mount up in the whole mount table. With 20,000 mounts that makes an
assembly ten times slower than with a short table.

Do: keep the host's table short.""",
    "containerd-copies": """\
containerd 1.x has no id-mapped overlayfs layers. A container with a user range of its own gets a copy of all layers
with their owners changed: time and space grow with the size of the image.

Nothing is wrong as long as no container has a user namespace of its own.
Do: update before switching them on, or use flatmount's snapshotter, which serves 1.6 id-mapped root file systems.""",
    "snapshotter-missing": """\
containerd's configuration names a snapshotter that is neither built in nor a proxy plugin: images cannot be unpacked
and containers not started with it.

Seen by: containerd's configuration (versions 1 to 3, with its imports); containerd itself was not asked.
Do: name one that is there, or add [proxy_plugins.NAME] with its type and address.""",
    "snapshotter-copies": """\
The snapshotter `native` has no overlayfs: each container gets a copy of every file of its image. There are few mounts,
and a start takes as long as copying.

Seen by: containerd's configuration.
Do: configure "overlayfs", unless the file system below cannot do it.""",
    "snapshotter-fuse": """\
Snapshotters that read layers from a registry while containers run (stargz, soci, nydus and the like) mount a FUSE file
system for each such layer. These mounts stay for as long as an image is used and lengthen the table that every start
copies.

Nothing is wrong. Seen by: containerd's configuration. Do: watch the table's length.""",
    "snapshotter-no-remap": """\
From 2.0 on containerd hands id mappings to a proxy snapshotter that declares the capability "remap-ids". Without it,
containerd copies the layers and changes their owners for each user range, and still sends the mappings: a snapshotter
that shifts ids as well then shows files that belong to nobody.

Seen by: containerd's configuration.
Do: add capabilities = ["remap-ids"] to the plugin's section, if it does shift ids.""",
    "snapshotter-not-unpacked": """\
From 2.1 on CRI and `ctr images pull` leave pulling to containerd's transfer service, which unpacks only for the
snapshotters that its unpack_config names; its own list has overlayfs, and not flatmount. Pulls then end with "unable to
initialize unpacker: no unpack platforms defined". Images that are there already, and pulls that go past that service
(`ctr images pull --local`, CRI with use_local_image_pull), work.

Seen by: containerd's configuration. `flatmount containerd status` says the same of the file that it is given.
Do: `flatmount containerd install` (with --cri where CRI takes the snapshotter) completes a section of its own; to
another add the entry that `--print` shows. Restart containerd. See: containerd issue 11606.""",
    "runc-self-bind": """\
runc before 1.2 bind-mounts its own binary read-only for a moment at each start and each exec: two mounts and an umount
in the host's table. With health checks by exec that wakes whoever follows the table all the time.

Do: update runc to 1.2 or later. See: opencontainers/runc issue 3925 and pull request 3931.""",
    "storage-copies": """\
This version of podman or CRI-O keeps a copy of an image for each user range instead of id-mapping its layers.

Do: update, if containers have user namespaces of their own.""",
    "no-idmapped-mounts": """\
Containers with user namespaces of their own need id-mapped mounts of the layers' file system. This one has none (NFS,
many FUSE file systems, ZFS before 2.2): engines then copy every image for every user range, or refuse.

Seen by: trying it on a detached clone of the directory.
Do: put the engine's directory on ext4, xfs, btrfs (5.15), erofs (5.19), tmpfs (6.3). `flatmount probe` says more.""",
    "user-namespaces-off": """\
user.max_user_namespaces is 0: no container can have a user namespace.

Do: sysctl user.max_user_namespaces=65536, in /etc/sysctl.d to keep it.""",
    "open-files": """\
The machine is near its limit of open files; mounting and starting containers then fails with ENFILE.

Do: raise fs.file-max, and find out who holds so many.""",
    "few-mount-namespaces": """\
user.max_mnt_namespaces limits how many mount namespaces the processes of a user may have, and each detached mount
counts as one. Starts fail with ENOSPC when it is reached.

Do: sysctl user.max_mnt_namespaces=65536.""",
    "pressure": """\
Tasks wait for processors, memory or disks for a large part of the time (PSI). Waiting for mount locks shows in none of
these, and a node may stall with little pressure.

Do: `flatmount profile --for 30s` tells lock waits from load.""",
    "topology": """\
A contended lock's cache line travels between the processors that want it. Between sockets and between last-level caches
that takes several times as long as within one, and a thread that spins slows its sibling on the same core. The same
number of mount operations then takes longer.

Nothing is wrong: this is a risk to know. Do: keep bursts of starts within one cache domain, or make the mounts few.""",
    "layer-limit": """\
overlayfs takes 500 lower layers. Engines that give them as one string end sooner: mount options are cut at 4,095 bytes,
and long snapshot paths reach that at about 390 layers.

Do: build the image with fewer layers.""",
    "time-outs": """\
kubelet and the container runtime gave up waiting, several times in the last quarter of an hour. With mounts as the
cause, these come together with bursts of starts, and the node is otherwise idle.

Seen by: known lines in the journal of kubelet, containerd, CRI-O and docker.
Do: `flatmount watch` while it happens, or `flatmount profile --for 30s`.""",
}
