"""The kinds of backbones there are, and which methods are for which."""

import numpy as np

# kind -> `BackboneSpec` changes that make one of a backbone for images.
KINDS = {
  'images': {},
  'clips': {'frames': 4, 'tubelet': 2},
  'factorised': {'frames': 4, 'tubelet': 2, 'factorised': True},
}
# Methods that a kind is refused for.
REFUSED = {
  'images': {'temporal'},
  'clips': {'hst', 'temporal'},
  'factorised': {'hst', 'toast', 'toast_lite'},
}


def of(method):
  """The kinds that a method is for."""
  return [kind for kind in KINDS if method not in REFUSED[kind]]


def changes(method, **more):
  """`BackboneSpec` changes of the first kind that a method is for; nothing for most methods."""
  first = KINDS[of(method)[0]]
  return {**first, **(more if first else {})}


def batch_of(model, make_batch, size, seed=0):
  """A batch of random images or clips for a model."""
  batch = make_batch(size, seed=seed)
  rng = np.random.default_rng(seed)
  batch['inputs'] = rng.standard_normal(model.input_shape(size)).astype(np.float32)
  return batch
