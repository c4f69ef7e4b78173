"""Simulated devices for tensor-parallel tests; this has to happen before JAX starts its CPU backend."""

import jax

jax.config.update("jax_num_cpu_devices", 4)
