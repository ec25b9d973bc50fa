"""Networks beside the backbone: LoSA, LST, Res-Tuning-Bypass, LAST, DTL."""

import math

from reference import numeric
from reference.vit import ViT, bottleneck


class Side(ViT):
  """The backbone runs first; `side()` then yields what stands in for the last block's output."""

  def encode(self, x):
    super().encode(x)
    return self.side()

  def side(self):
    raise NotImplementedError


class LoSA(Side):
  """y_i = g_i(b_i + y_{i-1}) + y_{i-1}, y_0 = b_L (Mercea et al. 2024, Eq. 3-6).

  g is alpha (gelu(x W_d + c_d) W_u + c_u), over channels in odd layers and over tokens in even
  ones (counted from 1); of a clip, over the places of each frame plus over the frames of each
  place.
  """

  def attention(self, i, h, queries=None):
    y = super().attention(i, h, queries)
    self.outputs.append(y)
    return y

  def mlp(self, i, h):
    y = super().mlp(i, h) + self.map_lora(i, 'mlp', h)
    self.outputs.append(y)
    return y

  def project(self, i, name, x):
    return super().project(i, name, x) + self.map_lora(i, name, x)

  def map_lora(self, i, name, x):
    p = self.insert(i, name) if i == 'map' else None
    return x @ p['a'] @ p['b'] if p else 0

  def stream(self):
    kind, depth = self.options.get('activation', 'block'), self.spec.depth
    if kind == 'both':
      return self.outputs[: 2 * depth]
    taps = {'block': self.taps, 'mhsa': self.outputs[0::2], 'mlp': self.outputs[1::2]}[kind]
    count = self.options.get('num_layers') or depth
    return [taps[round(j * depth / count) - 1] for j in range(1, count + 1)]

  def encode(self, x):
    self.outputs = []
    return super().encode(x)

  def side(self):
    y = self.embedded if self.options.get('y0') == 'b_0' else self.taps[-1]
    for i, tap in enumerate(self.stream()):
      y = y + self.layer(i, tap + y)
    return y

  def layer(self, i, x):
    if self.options.get('adaptor') == 'low_rank_mlp':
      return self.mix(f'side/layers_{i}/channel', x)
    path = f'side/layers_{i // 2}'
    if i % 2 == 0:
      return self.mix(f'{path}/channel', x)
    if self.spec.frames:
      clip = x.reshape(len(x), self.spec.grid[0], -1, x.shape[-1])
      space = self.mix(f'{path}/spatial', clip.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2)
      time = self.mix(f'{path}/temporal', clip.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
      return (space + time).reshape(x.shape)
    return self.mix(f'{path}/token', x.swapaxes(1, 2)).swapaxes(1, 2)

  def mix(self, path, x):
    p = self.table(path)
    return p['alpha'] * bottleneck(p, x, self.gelu)


class ResTuningBypass(Side):
  """h_l = A_l(b_l) + A'_l(h_{l-1}), h_0 = b_0, A(z) = z + W_2 gelu(W_1 z) (Jiang et al. 2023).

  In the paper the two terms have the weights lam and 1 - lam.
  """

  def side(self):
    h = self.embedded
    for i, tap in enumerate(self.taps):
      lateral, vertical = self.adapt(f'side/lateral_{i}', tap), self.adapt(f'side/vertical_{i}', h)
      if self.options['form'] == 'weighted':
        lam = numeric.sigmoid(self.params['side/gate'][i])
        lateral, vertical = lam * lateral, (1 - lam) * vertical
      h = lateral + vertical
    return h

  def adapt(self, path, z):
    return z + bottleneck(self.table(path), z, self.gelu)


class LST(Side):
  """h_l = Block_l(mu_l h_{l-1} + (1 - mu_l) D_l b_l), h_0 = D_0 b_0 (Sung et al. 2022, 3.2).

  mu_l = sigmoid(a_l / 0.1); U LN(h_L) stands in for the backbone's normalised output.
  """

  def side(self):
    h = self.linear('side/down_0', self.embedded)
    for i, tap in enumerate(self.taps):
      mu = numeric.sigmoid(self.params['side/gate'][i] / 0.1)
      h = mu * h + (1 - mu) * self.linear(f'side/down_{i + 1}', tap)
      h = self.side_block(f'side/block_{i + 1}', h)
    return h

  def side_block(self, path, x):
    h = self.layer_norm(f'{path}/norm1', x)
    q, k, v = (self.linear(f'{path}/{name}', h) for name in ('query', 'key', 'value'))
    u = x + self.linear(f'{path}/out', numeric.attend(q, k, v, self.options['heads']))
    hidden = self.gelu(self.linear(f'{path}/fc1', self.layer_norm(f'{path}/norm2', u)))
    return u + self.linear(f'{path}/fc2', hidden)

  def final_norm(self, x):
    return self.linear('side/up', self.layer_norm('side/norm', x))


class LAST(Side):
  """Low-rank attention beside groups of blocks (Tang et al. 2024), in our reading.

  u_0 = z_0, u_i = F_i(u_{i-1} + z_i), F_i being T modules x + softmax(Q K^T / sqrt r) V W_o in a
  row with Q, K, V = LN(x) W; the output is u_m - sum_{i<m} z_i.
  """

  def side(self):
    group, modules = self.options['group'], self.options['modules']
    streams = [self.embedded, *self.taps[group - 1 :: group]]
    u = streams[0]
    for i, z in enumerate(streams[1:]):
      u = u + z
      for j in range(modules):
        u = u + self.attend_low_rank(f'side/group_{i}_module_{j}', u)
    return u - sum(streams[:-1])

  def attend_low_rank(self, path, x):
    h = self.layer_norm(f'{path}/norm', x)
    q, k, v = (self.linear(f'{path}/{name}', h) for name in ('query', 'key', 'value'))
    weights = numeric.softmax(q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1]))
    return self.linear(f'{path}/out', weights @ v)


class DTL(ViT):
  """h_l = h_{l-1} + x_{l-1} A_l B_l; from block M on, x_l = Block_l(x_{l-1}) + C(phi(h_l)).

  Fu et al. 2024, section 3: phi(t) = t sigmoid(beta t); C is the identity, or one depthwise
  convolution for all blocks which the class token passes by (DTL+). The features are
  LN_f(mean of the grid's tokens).
  """

  def encode(self, x):
    self.h = 0
    return super().encode(x)

  def block(self, i, x):
    first = (self.options['first_block'] or round(7 * self.spec.depth / 12)) - 1
    # The first injecting block holds the weights of those before it.
    p, at = self.insert(max(i, first), 'block'), min(i, first) if i <= first else 0
    self.h = self.h + x @ p['a'][at] @ p['b'][at]
    x = super().block(i, x)
    if i < first:
      return x
    added = self.h * numeric.sigmoid(self.options['beta'] * self.h)
    if self.options['kernel']:
      first, grid, last = self.split(added)
      kernel = self.params['shared/conv_kernel']
      frames = grid.reshape(-1, *grid.shape[2:])
      grid = numeric.depthwise(frames, kernel).reshape(grid.shape)
      added = self.join(first, grid, last)
    return x + added

  def final_norm(self, x):
    return x if self.options['pool'] == 'mean' else super().final_norm(x)

  def pool(self, x):
    if self.options['pool'] == 'mean':
      return super().final_norm(x[:, self.spec.prefix :].mean(axis=1))
    return super().pool(x)
