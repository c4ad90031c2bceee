"""Benchmarks: what the targets say, measured. Run with `make bench`."""
