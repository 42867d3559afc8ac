"""Batch jobs on disk: files, batches, the lines of their input and their results. Knows neither flask nor the engine."""
