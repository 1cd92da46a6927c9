"""The two forms of flat trees: what they cost to build and to keep, to assemble, and to look things up in."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from time import perf_counter_ns

from bench.images import real_images
from bench.measure import Figures, assemble_all, ratio, rounds, show_ratio
from flatmount.kernel.namespaces import enter_private_mounts
from flatmount.plan.mapping import Mapping
from flatmount.rootfs.assembler import Assembler
from flatmount.rootfs.image import probe_store, specification
from flatmount.rootfs.ranges import RangePool
from flatmount.store import FlatForm, Store, StoredImage
from flatmount.strategies import Attach, Choice, Upper

ROUNDS = 5
CONTAINERS = 100
SHARING = 10
METHOD = f"""\
Both forms of one image, in a store in /var/tmp (EROFS reads no files of a tmpfs); {ROUNDS} rounds, the order rotates.
Build: from the layers to a durable tree, syncfs or fsync and digest included, the other form absent, after a sync.
Assembly: {CONTAINERS} containers, two at a time, uppers in the store, microseconds of wall time each, undoing apart.
Look-up: in a writable container, by one process: `stat` of every path, then every file read, microseconds a path; cold
is after /proc/sys/vm/drop_caches, warm the same once more. Memory: what {SHARING} read-only containers that each read
everything add to the page cache, with the image's superblock shared (one pool) and not (a pool each).
"""


def run() -> None:
    """The whole section."""
    print(METHOD)
    enter_private_mounts()
    with tempfile.TemporaryDirectory(prefix="flatmount-bench-", dir="/var/tmp") as place:
        images = real_images(place)
        for what, image in images.items():
            target = os.path.join(place, "target")
            os.mkdir(target)
            with Store.open(f"{target}/store", create=True) as store:
                stored = store.import_image(image, name="i")
                print(f"{what}: {stored.files} files, {sum(layer.size_bytes for layer in stored.layers) >> 20} MiB")
                _Section(store, stored, target).run()
                print()
            shutil.rmtree(target)


class _Section:
    def __init__(self, store: Store, image: StoredImage, place: str) -> None:
        self._store = store
        self._image = image
        self._place = place
        self._facts = probe_store(store, images=True).facts

    def run(self) -> None:
        if not self._facts.erofs:
            print("  this kernel mounts no EROFS images")
            return
        for directory in ("roots", "tmp"):
            os.makedirs(f"{self._place}/{directory}", exist_ok=True)
        self._build()
        self._space()
        for ahead in (False, True):
            self._compare(
                f"assembly, ranges {'ahead' if ahead else 'fresh'}",
                {form: lambda number, f=form, a=ahead: self._assembly(f, number, ahead=a) for form in FlatForm},
            )
        for what, look in (("stat of every path", _stat_all), ("every file read", _read_all)):
            seen: dict[tuple[FlatForm, str], list[float]] = {}
            for number in range(ROUNDS):
                for form in tuple(FlatForm)[:: 1 if number % 2 else -1]:
                    with self._container(form, f"l{number}") as root:
                        for kind in ("cold", "warm"):
                            if kind == "cold":
                                _drop_caches()
                            seen.setdefault((form, kind), []).append(look(root))
            for kind in ("cold", "warm"):
                self._show(f"{what}, {kind}", {form: Figures(tuple(seen[form, kind])) for form in FlatForm})
        self._memory()

    def _build(self) -> None:
        measures: dict[str, Callable[[int], float]] = {form: self._builder(form) for form in FlatForm}
        seen = rounds(measures, ROUNDS)
        self._show("build, ms", {form: seen[form] for form in FlatForm})
        for form in FlatForm:
            self._store.ensure_flat(self._image, form)
        if shutil.which("mkfs.erofs") is None:
            print("  no mkfs.erofs here to compare with (tools/setup --tests installs it)")
            return
        tree = os.path.join(self._store.data, self._store.ensure_flat(self._image))
        other = f"{self._place}/other.erofs"
        tried = subprocess.run(["mkfs.erofs", "--quiet", other, tree], capture_output=True, text=True, check=False)
        if tried.returncode:
            said = " ".join(tried.stderr.split())
            print(f"  mkfs.erofs cannot make an image of this tree: {said}")
            return
        os.unlink(other)

        def mkfs(_: int) -> float:
            os.sync()
            begun = perf_counter_ns()
            subprocess.run(["mkfs.erofs", "--quiet", other, tree], check=True, stdout=subprocess.DEVNULL)
            subprocess.run(["sync", other], check=True)
            took = (perf_counter_ns() - begun) / 1e6
            size = os.stat(other).st_blocks * 512
            os.unlink(other)
            sizes.append(size)
            return took

        sizes: list[int] = []
        both = rounds({"ours": self._builder(FlatForm.EROFS, keep=FlatForm.HARDLINK), "mkfs.erofs": mkfs}, ROUNDS)
        print(f"  {'EROFS from a tree of hard links, ms':<44} {both['ours']}")
        print(f"  {'mkfs.erofs and sync of the same, ms':<44} {both['mkfs.erofs']}   {sizes[0] / (1 << 20):.1f} MiB")
        show_ratio("EROFS: build of ours over mkfs.erofs", ratio(both["ours"], both["mkfs.erofs"]))
        self._store.ensure_flat(self._image, FlatForm.EROFS)

    def _builder(self, form: FlatForm, keep: FlatForm | None = None) -> Callable[[int], float]:
        def measure(_: int) -> float:
            for other in FlatForm:
                if other is not keep:
                    self._forget(other)
            os.sync()
            begun = perf_counter_ns()
            self._store.ensure_flat(self._image, form)
            return (perf_counter_ns() - begun) / 1e6

        return measure

    def _forget(self, form: FlatForm) -> None:
        self._store.drop_flat(self._image, form)

    def _space(self) -> None:
        for flat in self._store.costs(self._image).flat:
            print(
                f"  {f'space, {flat.form}':<44} {flat.usage.inodes:7} inodes, "
                f"{flat.usage.size_bytes / (1 << 20):8.1f} MiB on disk beside the layers"
            )

    def _compare(self, what: str, measures: dict[FlatForm, Callable[[int], float]]) -> None:
        seen = rounds({str(form): measure for form, measure in measures.items()}, ROUNDS)
        self._show(f"{what}, us", {form: seen[form] for form in FlatForm})

    def _show(self, what: str, figures: dict[FlatForm, Figures]) -> None:
        for form, figure in figures.items():
            print(f"  {f'{what}, {form}':<44} {figure}")
        show_ratio(f"{what}: erofs over hardlink", ratio(figures[FlatForm.EROFS], figures[FlatForm.HARDLINK]))

    def _assembler(self, form: FlatForm, pool: RangePool, upper: Upper, attach: Attach = Attach.HOST) -> Assembler:
        scratch = f"{self._place}/tmp/ovl-"
        spec = specification(
            self._store,
            self._image,
            Choice("flat", "", erofs=form is FlatForm.EROFS),
            upper=upper,
            attach=attach,
            make_target=attach is Attach.HOST,
            scratch=scratch,
        )
        return Assembler(spec, "flat", pool, uppers=f"{self._store.data}/uppers", scratch=scratch, ephemeral=True)

    def _assembly(self, form: FlatForm, number: int, *, ahead: bool) -> float:
        pool = RangePool(self._store.data, self._facts)
        made = self._assembler(form, pool, Upper.STORE)
        tag = f"{form}{number}{ahead}"
        took = assemble_all(made, pool, f"{self._place}/roots", tag, CONTAINERS, at_once=2, ahead=ahead)
        pool.close()
        return took

    @contextmanager
    def _container(self, form: FlatForm, name: str) -> Iterator[str]:
        with closing(RangePool(self._store.data, self._facts)) as pool:
            made = self._assembler(form, pool, Upper.STORE, Attach.NONE)
            with made.assemble(Mapping.single(1 << 20), name) as rootfs:
                yield f"/proc/self/fd/{rootfs.descriptor}"

    def _memory(self) -> None:
        for form in FlatForm:
            for shared in (True, False):
                pools = [RangePool(self._store.data, self._facts) for _ in range(1 if shared else SHARING)]
                _drop_caches()
                before = _cached_bytes()
                held = []
                for number in range(SHARING):
                    made = self._assembler(form, pools[number % len(pools)], Upper.NONE, Attach.NONE)
                    rootfs = made.assemble(Mapping.single((1 + number) << 20), f"m{number}")
                    held.append(rootfs)
                    _read_all(f"/proc/self/fd/{rootfs.descriptor}")
                added = _cached_bytes() - before
                for rootfs in held:
                    rootfs.undo()
                for pool in pools:
                    pool.close()
                how = "shared" if shared else "not shared"
                print(f"  {f'page cache of {SHARING} containers, {form}, {how}':<60} {added / (1 << 20):8.1f} MiB")


def _paths(root: str) -> list[str]:
    return [os.path.join(here, name) for here, directories, files in os.walk(root) for name in (*directories, *files)]


def _stat_all(root: str) -> float:
    begun = perf_counter_ns()
    count = 0
    for path in _paths(root):
        os.lstat(path)
        count += 1
    return (perf_counter_ns() - begun) / 1e3 / count


def _read_all(root: str) -> float:
    begun = perf_counter_ns()
    count = 0
    for path in _paths(root):
        count += 1
        if os.path.isfile(path) and not os.path.islink(path):
            with open(path, "rb", buffering=0) as file:
                while file.read(1 << 20):
                    pass
    return (perf_counter_ns() - begun) / 1e3 / count


def _drop_caches() -> None:
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as control:
        control.write("3\n")


def _cached_bytes() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        found = {line.split(":")[0]: int(line.split()[1]) << 10 for line in file}
    return found["Cached"] + found["Buffers"]
