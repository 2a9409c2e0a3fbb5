"""Following any process that uses KVM: its ioctls decoded, the exits of its vCPUs read."""
