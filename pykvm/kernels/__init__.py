"""Linux kernels to boot: found on this host or fetched, with what an initramfs needs of them."""
