"""`python -m fp8scope_collector` is `fp8scope`."""

from fp8scope_collector.cli import main

main()
