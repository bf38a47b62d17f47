"""Tests by subject. Whatever imports one of them gets here first, before torch is loaded."""
import os

import pytest

pytest.register_assert_rewrite("tests.helpers", "tests.judges")

VISIBLE_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")      # for the suite on a GPU; no other test is to see one,
os.environ["CUDA_VISIBLE_DEVICES"] = ""                    # and torch looks when it is loaded
USERS_THREADS = os.environ.get("OMP_NUM_THREADS")          # for the benchmarks; elsewhere a thread a process is enough,
os.environ.setdefault("GOMP_SPINCOUNT", "1000")            # as model.py does
os.environ.setdefault("OMP_NUM_THREADS", "1")              # and two ranks on two cores do not wait for each other
