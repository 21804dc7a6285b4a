"""Compare speed with dalle-pytorch and the machine's limits: python -m benchmarks. The program never imports it."""
