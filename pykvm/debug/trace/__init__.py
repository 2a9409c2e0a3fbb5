"""Exit traces: writing, reading, summing and exporting them; following other KVM processes."""
