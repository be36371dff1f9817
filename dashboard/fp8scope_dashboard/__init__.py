"""The dashboard of fp8scope."""
