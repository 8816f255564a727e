"""Checkpoints: saving, checksums, restoring, reading one layer at a time, and the check of replicas."""
