"""The KVM ABI: one class per fd kind, one method per ioctl. No policy, no defaults."""
