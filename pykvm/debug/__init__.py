"""Looking inside: crash reports, exit statistics."""
