"""Benchmarks and fault campaigns: real processes, real Postgres with fsync on, a sink that is not the bottleneck.

speed    one module per benchmark
faults   a fleet under faults, everything from a seed
harness  what benchmarks share: the environment, baselines, proxies, figures
peers    the same emails by outbox and by comparable projects
"""
