"""Facts about x86 PCs: layout, segments, paging, CPUID, MSRs, ACPI. Imports nothing of pykvm but errors."""
