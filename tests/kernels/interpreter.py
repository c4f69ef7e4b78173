"""The Mosaic GPU interpreter's race detector as an assertion, by private imports."""

from contextlib import contextmanager

from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter


@contextmanager
def no_races():
    """Fail if a kernel interpreted inside with race detection had a race (JAX 0.11 only prints it)."""
    interpreter.reset_gpu_interpret_mode_state()
    try:
        yield
        races = interpreter.get_races()
        assert races is None or not races.races_found
    finally:
        interpreter.reset_gpu_interpret_mode_state()
