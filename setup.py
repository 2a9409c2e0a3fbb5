"""Only the hook that compiles native/ by cffi; everything else is in pyproject.toml."""

from setuptools import setup

setup(
    cffi_modules=["native/build.py:ffibuilder"],
    # cffi compiles against the stable ABI: one wheel serves every later Python
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
