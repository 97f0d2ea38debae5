"""Watching a run: metrics on disk, plots."""
