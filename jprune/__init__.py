"""jprune."""
