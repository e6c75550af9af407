"""Benchmarks: ours and peers in one process, checked before they are timed, recorded as JSON."""
