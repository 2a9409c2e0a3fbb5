"""The live machine: memory, bus, interrupts, exits, vCPUs."""
