"""The rules, one file each; `fp8scope_collector.diagnosis.catalogue` lists them."""
