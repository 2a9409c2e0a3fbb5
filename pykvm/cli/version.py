"""`pykvm version`. Layer: cli."""

from __future__ import annotations


def run(argv: list[str]) -> int:
    """Print versions; a host without KVM is no error here."""
    import sys
    from importlib.metadata import PackageNotFoundError, version

    from pykvm._native import lib
    from pykvm.errors import HostError
    from pykvm.kvm.system import API_VERSION, Kvm

    try:
        print(f"pykvm {version('pykvm-vmm')}")
    except PackageNotFoundError:
        print("pykvm (not installed, run from its source)")
    newest = max(getattr(lib, name) for name in dir(lib) if name.startswith("KVM_CAP_"))
    print(f"compiled with a <linux/kvm.h> of API {API_VERSION} that knows capabilities up to {newest}")
    try:
        with Kvm() as kvm:
            print(f"/dev/kvm speaks API {kvm.api_version()}")
    except HostError as error:
        print(f"/dev/kvm: {error}")
    print(f"Python {sys.version.split()[0]}")
    return 0
