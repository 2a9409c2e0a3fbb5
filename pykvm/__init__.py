"""pykvm: a programmable virtual machine monitor over /dev/kvm (Linux, x86-64)."""
