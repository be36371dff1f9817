"""Where statistics are kept: `schema` (the tables), the writing side, and `reader` (all that the dashboard sees)."""
