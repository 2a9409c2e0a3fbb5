"""A server for GDB's remote serial protocol: `pykvm start --gdb`, `Machine.gdb_server`."""
