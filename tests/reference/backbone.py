"""A backbone with all that `BackboneSpec` can say, written from what its documentation says.

Rotary positions turn complex numbers one pair of channels at a time, relative biases are looked up
one pair of tokens at a time, and every head is computed by itself. As complex numbers stand for
rotations here, this one takes no complex step.
"""

import dataclasses
import math

import numpy as np

from reference import numeric

ACTIVATIONS = {
  'relu': numeric.relu,
  'gelu_tanh': lambda x: numeric.gelu(x, 'tanh'),
  'gelu_erf': numeric.gelu_erf,
  'quick_gelu': numeric.quick_gelu,
  'silu': lambda x: x * numeric.sigmoid(x),
}


class Backbone:
  """A model whose parameters are a flat table {path: array}; `read` are the paths it has read."""

  def __init__(self, params, spec):
    self.leaves = {path: np.asarray(leaf, np.float64) for path, leaf in params.items()}
    self.spec, self.read = spec, set()

  def leaf(self, path):
    self.read.add(path)
    return self.leaves[path]

  def linear(self, path, x, bias=True):
    y = x @ self.leaf(f'{path}/kernel')
    return y + self.leaf(f'{path}/bias') if bias else y

  def norm(self, path, x):
    if self.spec.norm == 'rms':
      mean_square = (x**2).mean(-1, keepdims=True)
      return x / np.sqrt(mean_square + self.spec.norm_eps) * self.leaf(f'{path}/scale')
    scale, bias = self.leaf(f'{path}/scale'), self.leaf(f'{path}/bias')
    return numeric.layer_norm(x, scale, bias, self.spec.norm_eps)

  def embedded(self, images):
    spec, p = self.spec, self.spec.patch
    clips = images.astype(np.float64) if spec.frames else images.astype(np.float64)[:, None]
    side, t = spec.image_size // p, spec.tubelet
    cuts = [
      clips[:, i * t : (i + 1) * t, y * p : (y + 1) * p, x * p : (x + 1) * p]
      for i in range(clips.shape[1] // t)
      for y in range(side)
      for x in range(side)
    ]
    x = np.stack([cut.reshape(len(clips), -1) for cut in cuts], axis=1)
    x = self.linear('patch/proj', x, spec.patch_bias)
    if spec.patch_norm:
      x = self.norm('patch_norm', x)
    first = [np.zeros((len(x), 0, spec.width))]
    if spec.class_token:
      first.append(numeric.repeat(self.leaf('cls'), len(x)))
    if spec.registers:
      first.append(numeric.repeat(self.leaf('registers'), len(x)))
    self.prefix, self.side = sum(part.shape[1] for part in first), side
    x = np.concatenate([*first, x], axis=1)
    if spec.positions == 'learned':
      x = x + self.leaf('pos_embedding')
    return self.norm('pre_norm', x) if spec.pre_norm else x

  def place(self, token):
    """(row, column) of a token of an image, or None for one that is not on the grid."""
    return divmod(token - self.prefix, self.side) if token >= self.prefix else None

  def turned(self, x):
    """Rotary positions of one head, [b n e]: pairs of channels as complex numbers."""
    spec, (_, n, e) = self.spec, x.shape
    quarter, out = e // 4, x.copy()
    for token in range(n):
      if self.place(token) is None:
        continue
      for pair in range(e // 2):
        coordinate = self.place(token)[pair // quarter]
        frequency = spec.rope_theta ** (-(pair % quarter) / quarter)
        if spec.rope == 'eva':
          angle = coordinate * spec.rope_grid / self.side * frequency
          a, b = 2 * pair, 2 * pair + 1
        else:
          angle = 2 * math.pi * ((2 * coordinate + 1) / self.side - 1) * frequency
          a, b = pair, pair + e // 2
        z = (x[:, token, a] + 1j * x[:, token, b]) * np.exp(1j * angle)
        out[:, token, a], out[:, token, b] = z.real, z.imag
    return out

  def relative_bias(self, path, head, n):
    """[n n]: by the offset of query and key; three rows for pairs with the class token."""
    table, bias = self.leaf(path)[:, head], np.zeros((n, n))
    for query in range(n):
      for key in range(n):
        at, to = self.place(query), self.place(key)
        if at is None or to is None:
          bias[query, key] = table[-1 if at is to else -3 if at is None else -2]
        else:
          dy, dx = at[0] - to[0] + self.side - 1, at[1] - to[1] + self.side - 1
          bias[query, key] = table[dy * (2 * self.side - 1) + dx]
    return bias

  def compared(self, path, x, head):
    """Queries or keys of one head."""
    spec, size = self.spec, self.spec.width // self.spec.heads
    if spec.qk_norm == 'width':
      x = self.norm(path, x)
    x = x[..., head * size : (head + 1) * size]
    if spec.qk_norm == 'head':
      x = self.norm(path, x)
    return x if spec.rope == 'none' else self.turned(x)

  def attn(self, block, u):
    spec, size = self.spec, self.spec.width // self.spec.heads
    biased = {'qkv': ('query', 'key', 'value'), 'qv': ('query', 'value'), 'none': ()}
    q, k, v = (
      self.linear(f'{block}/{name}', u, name in biased[spec.qkv_bias])
      for name in ('query', 'key', 'value')
    )
    heads = []
    for head in range(spec.heads):
      qh = self.compared(f'{block}/query_norm', q, head)
      kh = self.compared(f'{block}/key_norm', k, head)
      scores = qh @ kh.swapaxes(1, 2) / math.sqrt(size)
      if spec.relative_positions:
        scores = scores + self.relative_bias(f'{block}/relative_bias', head, u.shape[1])
      heads.append(numeric.softmax(scores) @ v[..., head * size : (head + 1) * size])
    y = np.concatenate(heads, axis=-1)
    if spec.attn_norm:
      y = self.norm(f'{block}/attn_norm', y)
    y = self.linear(f'{block}/out', y, spec.linear_bias)
    return y * self.leaf(f'{block}/attn_scale') if spec.layer_scale else y

  def mlp(self, block, u):
    spec, act = self.spec, ACTIVATIONS[self.spec.activation]
    y = self.linear(f'{block}/fc1', u, spec.linear_bias)
    y = act(self.linear(f'{block}/gate', u, spec.linear_bias)) * y if spec.gated else act(y)
    if spec.mlp_norm:
      y = self.norm(f'{block}/mlp_norm', y)
    y = self.linear(f'{block}/fc2', y, spec.linear_bias)
    return y * self.leaf(f'{block}/mlp_scale') if spec.layer_scale else y

  def map_head(self, x):
    q = self.linear('map_head/query', numeric.repeat(self.leaf('map_head/probe'), len(x)))
    k, v = self.linear('map_head/key', x), self.linear('map_head/value', x)
    z = self.linear('map_head/out', numeric.attend(q, k, v, self.spec.heads))
    hidden = self.linear('map_head/fc1', self.norm('map_head/norm', z))
    return (z + self.linear('map_head/fc2', ACTIVATIONS[self.spec.activation](hidden)))[:, 0]

  def features(self, images):
    """Of a factorised clip, the mean over time; each time is a clip of its own."""
    if not self.spec.factorised:
      return self.of_one(images)
    whole, t = self.spec, self.spec.tubelet
    self.spec = dataclasses.replace(whole, frames=t)
    times = [self.of_one(images[:, i : i + t]) for i in range(0, whole.frames, t)]
    self.spec = whole
    return np.mean(times, axis=0)

  def of_one(self, images):
    spec, x = self.spec, self.embedded(images)
    for i in range(spec.depth):
      block = f'encoder/layers_{i}/block'
      for norm, branch in (('norm1', self.attn), ('norm2', self.mlp)):
        if spec.block_norm == 'pre':
          x = x + branch(block, self.norm(f'{block}/{norm}', x))
        else:
          x = x + self.norm(f'{block}/{norm}', branch(block, x))
    x = self.norm('norm', x) if spec.final_norm == 'tokens' else x
    if spec.pool == 'map':
      x = self.map_head(x)
    elif spec.pool == 'gap':
      x = x[:, self.prefix :].mean(axis=1)
    else:
      x = x[:, : {'cls': 1, 'cls_dist': 2}[spec.pool]].mean(axis=1)
    return self.norm('norm', x) if spec.final_norm == 'pooled' else x
