"""FacT against increments of the weights, slice by slice, in NumPy."""

import jax
import numpy as np
import pytest

from losa_scenic.adapt_lib import methods
from losa_scenic.adapt_lib.fact_increments import TensorTrain
from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.sites import Ctx
from losa_scenic.model_lib.vit import ViT

D, RANK, SCALE = 32, 3, 0.7
SITES = ('query', 'key', 'value', 'out', 'fc1', 'fc2')


def cores_of(site, own, shared, layout):
  """The [r r] cores of a site, one at a time."""
  if 'cores' in own:
    return list(own['cores'])
  t = np.einsum('abk,jk->abj', shared['core'], own['p'])
  if layout == 'clean' or t.shape[2] == 1:
    return [t[:, :, j] for j in range(t.shape[2])]
  # As in the authors' code: x U times a [r, 4 r] matrix, or times its transpose.
  flat = t.reshape(RANK, -1)
  pieces = [flat[:, c * RANK : (c + 1) * RANK] for c in range(t.shape[2])]
  return [piece.T for piece in pieces] if site == 'fc2' else pieces


@pytest.mark.parametrize(
  ('method', 'mlp', 'layout'),
  [
    ('fact_tt', 64, None),
    ('fact_tt', 136, None),  # Four slices and eight hidden units without.
    ('fact_tt', 32, None),
    ('fact_tk', 128, 'clean'),
    ('fact_tk', 100, 'clean'),
    ('fact_tk', 128, 'released'),
  ],
)
def test_features_are_those_of_merged_weights(method, mlp, layout, random_like, make_batch):
  spec = presets.preset('test/8', mlp=mlp)
  options = {'rank': RANK, 'scale': SCALE} | ({'tk_layout': layout} if layout else {})
  model = Adapted(spec, methods.build(method, spec, options), 5)
  params = random_like(model.param_shapes(), scale=0.4)
  shared = params['shared']
  for i in range(spec.depth):
    layer = params['backbone']['encoder'][f'layers_{i}']
    for site in SITES:
      kernel, own = layer['block'][site]['kernel'], layer.pop(f'insert_{site}')
      cores = cores_of(site, own, shared, layout)
      assert len(cores) == (mlp // D if 'fc' in site else 1)
      for j, core in enumerate(cores):
        piece = slice(j * D, (j + 1) * D)
        at = (piece, slice(None)) if site == 'fc2' else (slice(None), piece)
        kernel[at] += SCALE * shared['u'] @ core @ shared['v']
  images = make_batch(2)['inputs']
  want = ViT(spec, {}).apply({'params': params['backbone']}, images)
  again = random_like(model.param_shapes(), scale=0.4)
  have = model.apply({'params': again}, images, method=model.features)
  np.testing.assert_allclose(have, want, rtol=1e-3, atol=1e-3)
  frozen = ViT(spec, {}).apply({'params': again['backbone']}, images)
  assert np.abs(have - frozen).max() > 0.1


def test_the_two_layouts_differ_and_have_the_same_parameters(random_like, make_batch):
  spec, features = presets.preset('test/8', mlp=128), []
  shapes = []
  for layout in ('clean', 'released'):
    model = Adapted(spec, methods.build('fact_tk', spec, {'rank': RANK, 'tk_layout': layout}), 5)
    shapes.append(trees.describe(model.param_shapes()))
    params = random_like(model.param_shapes(), scale=0.4)
    features.append(model.apply({'params': params}, make_batch(2)['inputs'], method=model.features))
  assert shapes[0] == shapes[1]
  assert np.abs(features[0] - features[1]).max() > 1e-2


@pytest.mark.parametrize('method', ['fact_tt', 'fact_tk'])
def test_initial_values_are_those_of_the_authors_code(method):
  spec, r = presets.preset('test/8', mlp=128), 40
  model = Adapted(spec, methods.build(method, spec, {'rank': r}), 5)
  values = model.init_trainable(jax.random.key(0))
  layer = values['backbone']['encoder']['layers_0']
  assert not np.any(values['shared']['v'])
  bounds = [(values['shared']['u'], D**-0.5)]
  if method == 'fact_tt':
    bounds += [(layer[f'insert_{site}']['cores'], r**-0.5) for site in SITES[:-1]]
    bounds += [(layer['insert_fc2']['cores'], (4 * r) ** -0.5)]
  else:
    p = np.concatenate([np.ravel(layer[f'insert_{site}']['p']) for site in SITES])
    bounds += [(p, (6 / (r + 3 * 12)) ** 0.5), (values['shared']['core'], 3**0.5 / r)]
  for value, bound in bounds:
    assert 0.97 * bound < np.abs(value).max() <= bound


def test_dropout_stands_before_v_and_acts_in_training_only():
  """With one hidden number per token, an output is either without increment or has it doubled."""
  shared = {'u': np.ones((2, 1), np.float32), 'v': np.ones((1, 2), np.float32)}
  module, x = TensorTrain(dropout=0.5), np.ones((1, 200, 2), np.float32)
  p = {'params': {'cores': np.ones((1, 1, 1), np.float32)}}

  def run(train):
    ctx = Ctx(grid=(1, 1, 200), shared=shared, train=train)
    rngs = {'dropout': jax.random.key(0)}
    return np.asarray(module.apply(p, lambda u: 0 * u, x, ctx, rngs=rngs))

  assert (run(False) == 2).all()
  y = run(True)
  assert set(np.unique(y)) == {0.0, 4.0} and (y[..., 0] == y[..., 1]).all()


@pytest.mark.parametrize('method', ['fact_tt', 'fact_tk'])
@pytest.mark.parametrize(
  ('options', 'mlp', 'message'),
  [
    ({'rank': 0}, 64, 'rank must be at least 1, got 0'),
    ({'scale': 0.0}, 64, r'scale must be positive, got 0\.0'),
    ({'dropout': 1.5}, 64, r'dropout must be in \[0, 1\), got 1\.5'),
    ({}, 31, 'slices of 32 units, the width; it has only 31'),
  ],
)
def test_a_bad_option_is_a_user_error(method, options, mlp, message):
  with pytest.raises(errors.UserError, match=message):
    methods.build(method, presets.preset('test/8', mlp=mlp), options)


def test_an_unknown_layout_is_a_user_error():
  with pytest.raises(errors.UserError, match=r"'releasd'\. Did you mean 'released'"):
    methods.build('fact_tk', presets.preset('test/8'), {'tk_layout': 'releasd'})
