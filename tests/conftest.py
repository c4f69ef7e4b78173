"""Simulated devices for tensor-parallel tests; this has to happen before JAX starts its CPU backend."""

import os

import jax

jax.config.update("jax_num_cpu_devices", 4)
# Each warpgroup of an interpreted cluster may block a thread of XLA's pool, of one per core unless told otherwise.
os.environ.setdefault("NPROC", "16")
