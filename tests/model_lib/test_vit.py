"""The image ViT against an independent numpy implementation, and its edges."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from losa_scenic.common_lib import errors
from losa_scenic.model_lib import layers, presets, vit
from losa_scenic.model_lib.vit import ViT


def gelu(x, kind):
  if kind == 'erf':
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
  return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def linear(p, x):
  return x @ p['kernel'] + p['bias']


def norm(p, x):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p['scale'] + p['bias']


def attend(q, k, v, heads):
  """softmax(q k^T / sqrt(d / heads)) v, one head at a time."""
  size, out = q.shape[-1] // heads, np.zeros_like(q)
  for h in range(heads):
    at = slice(h * size, (h + 1) * size)
    scores = np.exp(q[..., at] @ k[..., at].swapaxes(-1, -2) / math.sqrt(size))
    out[..., at] = scores / scores.sum(-1, keepdims=True) @ v[..., at]
  return out


def self_attention(p, q, x, heads):
  return linear(
    p['out'], attend(linear(p['query'], q), linear(p['key'], x), linear(p['value'], x), heads)
  )


def mlp(p, x, kind):
  return linear(p['fc2'], gelu(linear(p['fc1'], x), kind))


def reference(params, images, spec):
  """The forward pass of a ViT in float64, straight from Dosovitskiy et al. 2021, Eq. 1-4."""
  params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  s, p = spec.image_size // spec.patch, spec.patch
  patches = np.array(
    [
      [image[y * p : (y + 1) * p, x * p : (x + 1) * p].ravel() for y in range(s) for x in range(s)]
      for image in images.astype(np.float64)
    ]
  )
  x = linear(params['patch']['proj'], patches)
  if spec.class_token:
    x = np.concatenate([np.broadcast_to(params['cls'], (len(x), 1, spec.width)), x], axis=1)
  x = x + params['pos_embedding']
  for i in range(spec.depth):
    block = params['encoder'][f'layers_{i}']['block']
    u = norm(block['norm1'], x)
    x = x + self_attention(block, u, u, spec.heads)
    x = x + mlp(block, norm(block['norm2'], x), spec.gelu)
  x = norm(params['norm'], x)
  if spec.pool == 'cls':
    return x[:, 0]
  if spec.pool == 'gap':
    return x[:, -s * s :].mean(1)
  head = params['map_head']
  probe = np.broadcast_to(head['probe'], (len(x), 1, spec.width))
  z = self_attention(head, probe, x, spec.heads)
  return (z + mlp(head, norm(head['norm'], z), spec.gelu))[:, 0]


def init_shapes(spec, **fields):
  images = jax.ShapeDtypeStruct((1, spec.image_size, spec.image_size, 3), jnp.float32)
  return jax.eval_shape(ViT(spec, {}, **fields).init, jax.random.key(0), images)['params']


@pytest.mark.parametrize('gelu_kind', ['tanh', 'erf'])
@pytest.mark.parametrize(
  ('pool', 'class_token'),
  [('cls', True), ('gap', False), ('gap', True), ('map', False), ('map', True)],
)
def test_features_equal_the_numpy_reference(pool, class_token, gelu_kind, random_like, make_batch):
  activation = f'gelu_{gelu_kind}'
  spec = presets.preset('test/8', pool=pool, class_token=class_token, activation=activation)
  params, images = random_like(init_shapes(spec), scale=0.4), make_batch(2)['inputs']
  have = jax.jit(ViT(spec, {}).apply)({'params': params}, images)
  want = reference(params, images, spec)
  np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4)
  assert want.std() > 0.1


def test_the_reference_tells_the_gelus_apart(random_like, make_batch):
  tanh, erf = (presets.preset('test/8', activation=f'gelu_{kind}') for kind in ('tanh', 'erf'))
  params, images = random_like(init_shapes(tanh), scale=0.4), make_batch(2)['inputs']
  assert np.abs(reference(params, images, tanh) - reference(params, images, erf)).max() > 2e-4


@pytest.mark.parametrize('shape', [(1, 32, 40, 3), (1, 40, 40, 3), (1, 32, 32, 1)])
def test_a_wrong_image_size_is_a_user_error(shape):
  spec = presets.preset('test/8')
  with pytest.raises(errors.UserError, match=r"backbone 'test/8' is for \[32, 32, 3\]"):
    ViT(spec, {}).init(jax.random.key(0), jnp.zeros(shape))


def test_integer_images_are_normalised_and_floats_are_not():
  spec = presets.preset('test/8', mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
  want = (images / 255.0 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.25, 2.0])
  have = vit.normalize(jnp.asarray(images), spec)
  assert have.dtype == jnp.float32
  np.testing.assert_allclose(have, want, atol=1e-5)
  assert vit.normalize(have, spec) is have


def test_uint8_and_normalised_floats_give_the_same_features(random_like):
  spec = presets.preset('test/8')
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
  apply, params = jax.jit(ViT(spec, {}, scan=True).apply), random_like(init_shapes(spec, scan=True))
  floats = np.asarray(vit.normalize(jnp.asarray(images), spec))
  have, want = (apply({'params': params}, x) for x in (images, floats))
  np.testing.assert_allclose(have, want, atol=1e-5)


def test_patch_embedding_is_a_convolution_with_the_reshaped_kernel(random_like, make_batch):
  spec, images = presets.preset('test/8'), make_batch(2)['inputs']
  module = layers.PatchEmbed(spec)
  params = random_like(jax.eval_shape(module.init, jax.random.key(0), images)['params'])
  conv = nn.Conv(spec.width, (8, 8), strides=(8, 8), padding='VALID')
  kernel = params['proj']['kernel'].reshape(8, 8, 3, spec.width)
  want = conv.apply({'params': {'kernel': kernel, 'bias': params['proj']['bias']}}, images)
  have = module.apply({'params': params}, images)
  np.testing.assert_allclose(have, want.reshape(2, 16, spec.width), rtol=1e-4, atol=1e-4)


def test_head_sites_without_a_map_head_are_a_user_error():
  spec = presets.preset('test/8')
  with pytest.raises(errors.UserError, match=r"Sites \['pool_key'\] exist only with pooling 'map'"):
    ViT(spec, {'pool_key': nn.Module}).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
