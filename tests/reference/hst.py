"""HST: a convolutional-transformer pyramid that reads a ViT (Lin et al. 2023, section 3)."""

import numpy as np

from reference import numeric
from reference.prompts import append
from reference.vit import ViT


class HST(ViT):
  """Four stages of side blocks; each block reads one block of the backbone.

  Meta tokens join every backbone block and leave after it. A side block does
  s += CrossAttn(LN s; [LN(T g_l); mean(T F_l)]), s += T F_l, s += MLP(LN s): g_l the meta tokens'
  outputs, F_l the patches' outputs resized to the stage's grid, T the stage's projection.
  Running statistics stand for those of the batch.
  """

  def block(self, i, x):
    y = super().block(i, append(x, self.insert(i, 'block')['meta']))
    self.meta.append(y[:, self.tokens :])
    return y[:, : self.tokens]

  def __call__(self, images):
    self.meta = []
    self.encode(self.embed(images))
    s = self.stem(images)
    stages = self.options['stages']
    per_stage = self.spec.depth // stages
    for stage in range(stages):
      if stage:
        s = self.convolution(f'side/down_{stage}', s, 2, (1, 1))
        s = self.layer_norm(f'side/down_norm_{stage}', s)
      for j in range(per_stage):
        s = self.side_block(stage, stage * per_stage + j, s)
      s = self.layer_norm(f'side/norm_{stage}', s)
    return self.batch_norm('side/bn', s.mean(axis=(1, 2)), 1e-6)

  def stem(self, images):
    s = self.convolution('side/stem/conv1', images, 2, (1, 1))
    s = numeric.relu(self.batch_norm('side/stem/bn', s, 1e-5))
    return self.layer_norm('side/stem/norm', self.convolution('side/stem/conv2', s, 2, (0, 0)))

  def convolution(self, path, x, stride, padding):
    p = self.table(path)
    return numeric.convolve(x, p['kernel'], stride, padding) + p.get('bias', 0)

  def batch_norm(self, path, x, eps):
    mean, var = self.state[f'{path}/mean'], self.state[f'{path}/var']
    p = self.table(path)
    return (x - mean) / np.sqrt(var + eps) * p.get('scale', 1) + p.get('bias', 0)

  def side_block(self, stage, i, s):
    b, height, width, c = s.shape
    path, bridge = f'side/block_{i}', f'side/bridge_{stage}'
    meta = self.layer_norm(f'side/meta_norm_{i}', self.linear(bridge, self.meta[i]))
    grid = self.split(self.taps[i])[1][:, 0]
    features = self.linear(bridge, numeric.resize(grid, height, width)).reshape(b, -1, c)
    source = np.concatenate([meta, features.mean(axis=1, keepdims=True)], axis=1)
    s = s.reshape(b, -1, c)
    q = self.linear(f'{path}/query', self.layer_norm(f'{path}/norm1', s))
    k, v = self.linear(f'{path}/key', source), self.linear(f'{path}/value', source)
    heads = (2, 4, 8, 12)[stage]
    s = s + self.linear(f'{path}/out', numeric.attend(q, k, v, heads)) + features
    hidden = self.gelu(self.linear(f'{path}/fc1', self.layer_norm(f'{path}/norm2', s)))
    return (s + self.linear(f'{path}/fc2', hidden)).reshape(b, height, width, c)
