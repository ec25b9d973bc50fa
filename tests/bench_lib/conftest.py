"""Planning for other devices sets JAX's platforms."""

import jax
import pytest


@pytest.fixture(autouse=True)
def platforms():
  """Later tests find the devices that they would have found."""
  jax.devices()
  before = jax.config.jax_platforms
  yield
  jax.config.update('jax_platforms', before)
