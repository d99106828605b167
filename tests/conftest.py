"""Environment of the whole test suite; it must stand before torch and vllm are imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads only fight over the cores of a small machine
os.environ.setdefault("HF_HUB_OFFLINE", "1")
