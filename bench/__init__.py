"""Benchmarks: one module per question, one row format, paired and interleaved timing."""
