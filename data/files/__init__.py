"""Files and places: listings of local and remote files, byte ranges, and retries."""
