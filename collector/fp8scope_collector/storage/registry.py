"""Gives an opening source its rows: run, source, slots and recipes, all within the caller's transaction.

Slots are numbered once a run, by (layer, role), so that the same layer has the same number on all ranks and in all
incarnations; a rank that holds other layers (pipeline parallelism) appends its own. The run's row is locked first:
ranks that open at the same time, on several collectors too, take turns.
"""

from __future__ import annotations

import json
from typing import Any

import grpc
import numpy as np
import sqlalchemy as sa

from fp8core.formats import FORMATS
from fp8scope_collector.decode import RefusedError
