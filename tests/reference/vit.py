"""The plain vision transformer, one overridable method for every step.

Dosovitskiy et al. 2021, Eq. 1-4 with pre-norm blocks, the attention pooling of Zhai et al. 2022,
and the joint space-time attention over tubelets of Arnab et al. 2021 (model 1).
"""

import itertools

import numpy as np

from reference import numeric


class ViT:
  """Features of a model whose parameters are a flat table {path: float64 array}.

  Layers count from 0; 'map' in the place of a layer means the MAP head, whose linears are called
  as those of a block.
  """

  def __init__(self, params, spec, options=None, state=None):
    self.params, self.spec, self.options = params, spec, options or {}
    self.state = state or {}
    self.layers = range(spec.depth)
    self.tokens = spec.tokens
    self.taps = []

  def table(self, path):
    """Parameters below a path, by what follows it."""
    return {k[len(path) + 1 :]: v for k, v in self.params.items() if k.startswith(path + '/')}

  def insert(self, i, site):
    """A method's own parameters at a site of layer i, or of the MAP head."""
    if i == 'map':
      return self.table(f'backbone/insert_pool_{site}')
    return self.table(f'backbone/encoder/layers_{i}/insert_{site}')

  def path(self, i, name):
    at = 'map_head' if i == 'map' else f'encoder/layers_{i}/block'
    return f'backbone/{at}/{name}'

  def linear(self, path, x):
    return x @ self.params[f'{path}/kernel'] + self.params[f'{path}/bias']

  def layer_norm(self, path, x):
    scale, bias = self.params[f'{path}/scale'], self.params[f'{path}/bias']
    return numeric.layer_norm(x, scale, bias, self.spec.norm_eps)

  def gelu(self, x):
    return numeric.gelu(x, self.spec.gelu)

  def __call__(self, images):
    self.images = images
    return self.pool(self.final_norm(self.encode(self.embed(images))))

  def patches(self, images):
    """[b t? h w 3] -> [b n tubelet*patch*patch*3], time slowest, then rows, then columns."""
    clips = images if self.spec.frames else images[:, None]
    f, p = self.spec.tubelet, self.spec.patch
    t, h, w = self.spec.grid
    corners = itertools.product(range(0, t * f, f), range(0, h * p, p), range(0, w * p, p))
    rows = [clips[:, z : z + f, y : y + p, x : x + p] for z, y, x in corners]
    return np.stack([row.reshape(len(clips), -1) for row in rows], axis=1)

  def patch_embed(self, patches):
    return self.linear('backbone/patch/proj', patches)

  def embed(self, images):
    x = self.patch_embed(self.patches(images))
    if self.spec.class_token:
      x = np.concatenate([numeric.repeat(self.params['backbone/cls'], len(x)), x], axis=1)
    return x + self.params['backbone/pos_embedding']

  def encode(self, x):
    self.embedded, self.taps = x, []
    for i in self.layers:
      x = self.block(i, x)
      self.taps.append(x)
    return x

  def block(self, i, x):
    u = x + self.attention(i, self.norm1(i, x))
    return u + self.mlp(i, self.norm2(i, u))

  def norm1(self, i, x):
    return self.layer_norm(self.path(i, 'norm1'), x)

  def norm2(self, i, u):
    return self.layer_norm(self.path(i, 'norm2'), u)

  def attention(self, i, h, queries=None):
    """Attention output before the residual; the queries are the tokens h themselves, or others."""
    queries = h if queries is None else queries
    q = self.project(i, 'query', queries)
    k, v = self.project(i, 'key', h), self.project(i, 'value', h)
    return self.project(i, 'out', self.attend(i, q, k, v))

  def attend(self, i, q, k, v):
    return numeric.attend(q, k, v, self.spec.heads)

  def project(self, i, name, x):
    """One of the linears query, key, value, out, fc1, fc2 of a layer."""
    return self.linear(self.path(i, name), x)

  def mlp(self, i, h):
    return self.project(i, 'fc2', self.gelu(self.project(i, 'fc1', h)))

  def final_norm(self, x):
    return self.layer_norm('backbone/norm', x)

  def split(self, x):
    """Class token, the grid [b t h w d], whatever a method has appended."""
    first, last = self.spec.prefix, self.tokens
    grid = x[:, first:last].reshape(len(x), *self.spec.grid, x.shape[-1])
    return x[:, :first], grid, x[:, last:]

  def join(self, first, grid, last):
    return np.concatenate([first, grid.reshape(len(grid), -1, grid.shape[-1]), last], axis=1)

  def pooled_tokens(self, x):
    """What the MAP head attends to: without what a method has appended."""
    return x[:, : self.tokens]

  def pool(self, x):
    if self.spec.pool == 'cls':
      return x[:, 0]
    if self.spec.pool == 'gap':
      return x[:, self.spec.prefix : self.tokens].mean(axis=1)
    x = self.pooled_tokens(x)
    probe = numeric.repeat(self.params['backbone/map_head/probe'], len(x))
    z = self.attention('map', x, queries=probe)
    return (z + self.mlp('map', self.layer_norm('backbone/map_head/norm', z)))[:, 0]


def bottleneck(p, x, activation):
  """act(x W_d + c_d) W_u + c_u: the body of every adapter."""
  hidden = activation(x @ p['down_kernel'] + p['down_bias'])
  return hidden @ p['up_kernel'] + p['up_bias']
