"""The native part: one extension on the stable ABI, so that a wheel serves every Python from 3.11, and one program."""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sources = sorted(str(path) for path in Path("native").glob("*.c"))
headers = sorted(str(path) for path in Path("native").glob("*.h"))
warnings = ["-std=gnu11", "-O2", "-Wall", "-Wextra"]


class BuildExtAndProgram(build_ext):
    """Builds flatmount-assemble beside the extension, where `flatmount.snapshotter` finds it."""

    def run(self) -> None:
        super().run()
        package = Path("src/flatmount" if self.inplace else f"{self.build_lib}/flatmount")
        objects = self.compiler.compile(
            ["native/assemble/flatmount-assemble.c"],
            output_dir=self.build_temp,
            depends=headers,
            extra_preargs=warnings,
        )
        (package / "libexec").mkdir(parents=True, exist_ok=True)
        self.compiler.link_executable(objects, "flatmount-assemble", output_dir=str(package / "libexec"))


setup(
    cmdclass={"build_ext": BuildExtAndProgram},
    ext_modules=[
        Extension(
            "flatmount.kernel._native",
            sources=sources,
            depends=headers,
            define_macros=[("Py_LIMITED_API", "0x030b0000"), ("_GNU_SOURCE", "1")],
            extra_compile_args=[*warnings, "-Wno-unused-parameter", "-fvisibility=hidden"],
            py_limited_api=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
