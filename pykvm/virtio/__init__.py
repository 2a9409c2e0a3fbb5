"""virtio 1.2 devices over MMIO. Layer: what exists."""
