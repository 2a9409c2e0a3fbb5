"""Exit traces in the format that Perfetto and chrome://tracing load. Layer: debug.

Source: "Trace Event Format" (the Chromium project): complete events ("X") with `ts` and `dur` in microseconds, metadata
events ("M") that name the process and its threads. One thread for each vCPU; its time in the guest and the time
outside after each exit are slices, so that a timeline shows what a vCPU waits for.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pykvm.debug.trace.describe import Names, describe
from pykvm.debug.trace.tracefile import IN_C, LAST
from pykvm.debug.wholefile import whole_file
from pykvm.kvm.exits import reason_name

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO

    from pykvm.debug.trace.tracefile import Record, TraceFile

PROCESS = 1


def write_chrome(trace: TraceFile, path: str, names: Names | None = None) -> int:
    """Write the whole trace as JSON; the number of exits. `path` appears when it is complete. Raises UsageError."""
    with whole_file(path) as file:
        return _write(trace, file, names or Names(trace))


def _write(trace: TraceFile, file: IO[str], names: Names) -> int:
    file.write(f'{{"displayTimeUnit":"ns","otherData":{json.dumps({"meta": trace.meta})},"traceEvents":[\n')
    file.write(",\n".join(json.dumps(event) for event in _metadata(trace)))
    count = 0
    for record in trace:
        count += 1
        for event in events(record, trace.start_ns, names):
            file.write(f",\n{json.dumps(event)}")
    file.write("\n]}\n")
    return count


def _metadata(trace: TraceFile) -> Iterator[dict[str, object]]:
    kernel = trace.meta.get("kernel")
    yield {"ph": "M", "pid": PROCESS, "name": "process_name", "args": {"name": f"pykvm {kernel or ''}".strip()}}
    for vcpu in range(trace.vcpus):
        yield {"ph": "M", "pid": PROCESS, "tid": vcpu, "name": "thread_name", "args": {"name": f"vCPU {vcpu}"}}


def events(record: Record, start_ns: int, names: Names) -> Iterator[dict[str, object]]:
    """The slice before an exit and the one after it."""
    base = {"ph": "X", "pid": PROCESS, "tid": record.vcpu}
    entered = record.left_ns - record.guest_ns - start_ns
    yield {**base, "name": "guest", "cat": "guest", "ts": entered / 1000, "dur": record.guest_ns / 1000}
    arguments: dict[str, object] = {"exit": describe(record, names)}
    if record.rip:
        arguments["rip"] = names.code(record.rip)
    if record.lost:
        arguments["lost before"] = record.lost
    if record.flags & LAST:
        arguments["last"] = True
    yield {
        **base,
        "name": _short(record, names),
        "cat": f"{reason_name(record.reason)}{',C' if record.flags & IN_C else ''}",
        "ts": (record.left_ns - start_ns) / 1000,
        "dur": record.outside_ns / 1000,
        "args": arguments,
    }


def _short(record: Record, names: Names) -> str:
    """A name that slices of the same kind share: Perfetto colours by it."""
    name = reason_name(record.reason)
    if name not in ("IO", "MMIO"):
        return name
    device = names.device("port" if name == "IO" else "MMIO", record.address)
    return f"{name} {'write' if record.write else 'read'} {device or hex(record.address)}"
