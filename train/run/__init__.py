"""A run's folder: its paths, logs, lease, ledger of skipped batches, and time account."""
