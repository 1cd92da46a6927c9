"""The native part: one extension on the stable ABI, so that one wheel serves every Python from 3.11 on."""

from pathlib import Path

from setuptools import Extension, setup

sources = sorted(str(path) for path in Path("native").glob("*.c"))

setup(
    ext_modules=[
        Extension(
            "flatmount.kernel._native",
            sources=sources,
            depends=sorted(str(path) for path in Path("native").glob("*.h")),
            define_macros=[("Py_LIMITED_API", "0x030b0000"), ("_GNU_SOURCE", "1")],
            extra_compile_args=[
                "-std=gnu11",
                "-O2",
                "-Wall",
                "-Wextra",
                "-Wno-unused-parameter",
                "-fvisibility=hidden",
            ],
            py_limited_api=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
