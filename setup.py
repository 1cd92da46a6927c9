"""The native part: an extension on the stable ABI, so that one wheel serves Python 3.11 and later, and programs."""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

MACROS = [("_GNU_SOURCE", "1")]
FLAGS = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wno-unused-parameter", "-fvisibility=hidden"]


def sources(directory: str) -> list[str]:
    return sorted(str(path) for path in Path(directory).glob("*.c"))


# Where a program is, and how it is linked. The shim is static: it runs in containers without a C library, and starts
# in half the time.
PROGRAMS = {
    "flatmount-shim": ("native/shim", ["-static", "-Wl,-z,noexecstack"]),
    "flatmount-assemble": ("native/assemble", []),
}


class BuildNative(build_ext):
    """Builds the programs beside the extension, so that they go wherever that goes."""

    def run(self) -> None:
        super().run()
        beside = Path(self.get_ext_fullpath(self.extensions[0].name)).parent
        for name, (directory, linking) in PROGRAMS.items():
            objects = self.compiler.compile(
                sources(directory), output_dir=self.build_temp, macros=MACROS, extra_postargs=FLAGS
            )
            self.compiler.link_executable(objects, name, output_dir=str(beside), extra_postargs=linking)

    def get_outputs(self) -> list[str]:
        extensions: list[str] = super().get_outputs()
        return [*extensions, *(str(Path(path).parent / name) for path in extensions for name in PROGRAMS)]


setup(
    ext_modules=[
        Extension(
            "flatmount.kernel._native",
            sources=sources("native"),
            depends=sorted(str(path) for path in Path("native").glob("**/*.h")),
            define_macros=[("Py_LIMITED_API", "0x030b0000"), *MACROS],
            extra_compile_args=FLAGS,
            py_limited_api=True,
        ),
        # The snapshotter's door to containerd.
        Extension(
            "flatmount.snapshotter._front",
            sources=[*sources("native/front"), "native/upper.c", "native/read_uppers.c"],
            depends=[
                *sorted(str(path) for path in Path("native/front").glob("*.h")),
                "native/upper.h",
                "native/read_uppers.h",
            ],
            include_dirs=["native"],
            libraries=["nghttp2"],
            define_macros=[("Py_LIMITED_API", "0x030b0000"), *MACROS],
            extra_compile_args=FLAGS,
            py_limited_api=True,
        ),
    ],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
