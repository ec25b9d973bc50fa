"""LAST's side network against the published recurrence in u, written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from losa_scenic.adapt_lib import last, methods
from losa_scenic.adapt_lib.method import Run, partition, split_head
from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.encoder import Encoded
from losa_scenic.model_lib.vit import ViT

RANK = 3


def attention_module(p, x, eps=1e-6):
  """f(x) = x + delta(x), image by image and token by token."""
  norm = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
  norm = norm * p['norm']['scale'] + p['norm']['bias']
  q, k, v = (norm @ p[name]['kernel'] + p[name]['bias'] for name in ('query', 'key', 'value'))
  y = x.copy()
  for image in range(x.shape[0]):
    for token in range(x.shape[1]):
      weight = np.exp(k[image] @ q[image, token] / np.sqrt(q.shape[-1]))
      context = (weight[:, None] * v[image]).sum(0) / weight.sum()
      y[image, token] += context @ p['out']['kernel'] + p['out']['bias']
  return y


def reference(params, embedded, outputs, modules):
  """u_i = F_i(u_{i-1} + z_i), u_0 = z_0; o = u_m - (z_0 + .. + z_{m-1})."""
  params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  z = [np.asarray(a, np.float64) for a in (embedded, *outputs)]
  u = z[0]
  for i in range(1, len(z)):
    u = u + z[i]
    for t in range(modules):
      u = attention_module(params[f'group_{i - 1}_module_{t}'], u)
  return u - sum(z[:-1])


@pytest.mark.parametrize(('group', 'modules'), [(1, 1), (2, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize('scan', [False, True])
def test_model_equals_the_published_recurrence(group, modules, scan, random_like, make_batch):
  spec = presets.preset('test/8', depth=4)
  method = last.build(spec, rank=RANK, group=group, modules=modules)
  model = Adapted(spec, method, 5, scan=scan)
  params, images = random_like(model.param_shapes()), make_batch(2)['inputs']
  have = model.apply({'params': params}, images, method=model.features)
  plain = ViT(spec, {}, ('block',), scan=scan)
  backbone = {'params': params['backbone']}
  given = plain.apply(backbone, images, method='encode')
  outputs = [given.layers['block'][i] for i in range(group - 1, 4, group)]
  tokens = reference(params['side'], given.embedded, outputs, modules)
  want = plain.apply(backbone, jnp.asarray(tokens, jnp.float32), method='features')
  np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4)
  assert np.abs(tokens - given.tokens).max() > 0.1, 'the side network must matter in this test'


def test_sums_do_not_lose_the_update_in_bfloat16(random_like):
  # Outputs that are large beside the update, as in a trained backbone's residual stream.
  shape, dtype = (2, 5, 16), jnp.bfloat16
  z = [jnp.asarray(v, dtype) for v in 100 * np.random.default_rng(0).standard_normal((4, *shape))]
  given = Encoded(z[-1], z[0], {'block': z[1:]}, (1, 2, 2), 1)
  seen = []
  run = Run(
    encode=lambda inputs, train: given,
    encode_twice=lambda inputs: given,
    normed=lambda tokens, train: seen.append(tokens) or tokens,
    pooled=lambda tokens, train: tokens[:, 0],
  )
  module = last.LAST(RANK, taps=(0, 1, 2))
  call = {'run': run, 'inputs': jnp.zeros((2, 1)), 'train': False}
  params = random_like(jax.eval_shape(lambda: module.init(jax.random.key(0), **call)))
  outputs = [np.asarray(v, np.float64) for v in z]
  want = reference(params['params'], outputs[0], outputs[1:], 1)
  module.apply(params, **call)
  assert seen[-1].dtype == dtype
  rounding = 2.0**-8 * np.abs(outputs[-1]).max()
  np.testing.assert_allclose(np.asarray(seen[-1], np.float64), want, atol=2 * rounding)


def test_starts_as_the_frozen_model_and_has_gradients(random_like, make_batch):
  spec = presets.preset('test/8')
  model = Adapted(spec, last.build(spec), 5)
  start = model.init_trainable(jax.random.key(0))
  for path, leaf in trees.flatten(start['side']).items():
    is_zero = path.endswith(('bias', 'out/kernel'))
    assert np.any(leaf) != is_zero, path


@pytest.mark.parametrize(('group', 'modules'), [(1, 1), (3, 2)])
def test_parameter_count(group, modules):
  spec = presets.preset('test/8')
  method = last.build(spec, rank=RANK, group=group, modules=modules)
  trainable, _ = partition(Adapted(spec, method, 5).param_shapes(), method)
  d, count = spec.width, 3 // group * modules
  assert trees.count(split_head(trainable)[0]) == count * (4 * d * RANK + 3 * RANK + 3 * d)


def test_is_of_memory_class_a():
  assert last.build(presets.preset('test/8')).memory_class == 'A'


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'rank': 0}, 'rank must be at least 1, got 0'),
    ({'group': 0}, 'group must be at least 1, got 0'),
    ({'modules': -1}, 'modules must be at least 1, got -1'),
    ({'group': 2}, "group must divide the 3 blocks of backbone 'test/8', got 2"),
    ({'groups': 3}, "Did you mean 'group'"),
  ],
)
def test_a_bad_option_is_a_user_error(options, message):
  with pytest.raises(errors.UserError, match=message):
    methods.build('last', presets.preset('test/8'), options)
