"""Res-Tuning-Bypass against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from losa_scenic.adapt_lib import methods
from losa_scenic.adapt_lib.method import partition, split_head
from losa_scenic.bench_lib import cost
from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.vit import ViT

R = 3


def build(**options):
  spec = presets.preset('test/8')
  return Adapted(spec, methods.build('res_tuning_bypass', spec, {'bottleneck': R} | options), 5)


def tuner(p, z):
  x = z @ p['down_kernel'] + p['down_bias']
  x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
  return z + x @ p['up_kernel'] + p['up_bias']


def bypass(p, encoded, weighted):
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)
  h = np.asarray(encoded.embedded, np.float64)
  for i, b in enumerate(encoded.layers['block']):
    lateral, vertical = tuner(p[f'lateral_{i}'], b), tuner(p[f'vertical_{i}'], h)
    weight = 1 / (1 + np.exp(-p['gate'][i])) if weighted else None
    h = weight * lateral + (1 - weight) * vertical if weighted else lateral + vertical
  return h


@pytest.mark.parametrize('form', ['sum', 'weighted'])
def test_side_network_equals_numpy(form, random_like, make_batch):
  model, images = build(form=form), make_batch(2)['inputs']
  params = random_like(model.param_shapes(), scale=0.4)
  have = model.apply({'params': params}, images, method=model.features)
  plain, backbone = ViT(model.spec, {}, ('block',)), {'params': params['backbone']}
  encoded = plain.apply(backbone, images, method='encode')
  h = jnp.asarray(bypass(params['side'], encoded, form == 'weighted'), jnp.float32)
  np.testing.assert_allclose(
    have, plain.apply(backbone, h, method='features'), rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize(
  ('form', 'weights'), [('sum', [1, 1, 1, 1]), ('weighted', [1 / 8, 1 / 8, 1 / 4, 1 / 2])]
)
def test_with_zero_init_it_starts_as_a_sum_of_the_residual_stream(
  form, weights, random_like, make_batch
):
  model, images = build(form=form, zero_init=True), make_batch(2)['inputs']
  params = random_like(model.param_shapes()) | model.init_trainable(jax.random.key(0))
  have = model.apply({'params': params}, images, method=model.features)
  plain, backbone = ViT(model.spec, {}, ('block',)), {'params': params['backbone']}
  encoded = plain.apply(backbone, images, method='encode')
  stream = [encoded.embedded, *encoded.layers['block']]
  h = sum(weight * b for weight, b in zip(weights, stream, strict=True))
  np.testing.assert_allclose(
    have, plain.apply(backbone, h, method='features'), rtol=1e-4, atol=1e-4
  )


def test_by_default_no_matrix_starts_at_zero():
  side = trees.flatten(build().init_trainable(jax.random.key(0))['side'])
  kernels = [np.abs(leaf).max() for path, leaf in side.items() if path.endswith('kernel')]
  assert len(kernels) == 4 * 3 and min(kernels) > 0


@pytest.mark.parametrize(('form', 'gates'), [('sum', 0), ('weighted', 3)])
def test_parameter_count_formula(form, gates):
  model = build(form=form)
  trainable, _ = partition(model.param_shapes(), model.method)
  d, depth = model.spec.width, model.spec.depth
  assert trees.count(split_head(trainable)[0]) == 2 * depth * (2 * d * R + R + d) + gates
  assert set(trainable) == {'side', 'output_projection'}


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'bottleneck': 0}, 'bottleneck must be at least 1, got 0'),
    ({'form': 'weigted'}, "Did you mean 'weighted'"),
  ],
)
def test_a_bad_option_is_a_user_error(options, message):
  with pytest.raises(errors.UserError, match=message):
    build(**options)


def test_training_runs_the_encoder_forward_only():
  model = build(form='weighted')
  assert model.method.spares_backbone
  cost.check_spares_backbone(model, batch_size=8)
