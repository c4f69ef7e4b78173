"""Marks that tests of kernels share."""

import pytest

from kernels_pallas import mosaic

gpu = pytest.mark.gpu
hopper = pytest.mark.skipif(mosaic.device_without_kernels() is not None, reason="needs a Hopper GPU")
