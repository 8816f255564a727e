"""HTML pages of runs and attention, complete in one file each."""
