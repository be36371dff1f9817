"""Receives FP8 scaling statistics, stores them durably and exposes them: the command `fp8scope`."""
