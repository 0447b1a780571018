"""Data: sources, partitions, tasks."""
