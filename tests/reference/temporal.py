"""The factorised encoder of Arnab et al. 2021, section 3.3, model 2: first space, then time."""

import dataclasses

import numpy as np

from reference.vit import ViT


class Blocks(ViT):
  """The blocks of the temporal encoder."""

  def path(self, i, name):
    return f'backbone/insert_time/block_{i + 1}/{name}'


class Temporal(ViT):
  def __call__(self, images):
    t = self.spec.tubelet
    alone = ViT(self.params, dataclasses.replace(self.spec, frames=t, factorised=False))
    times = [alone(images[:, i : i + t]) for i in range(0, self.spec.frames, t)]
    x, blocks = np.stack(times, axis=1), Blocks(self.params, self.spec)
    z = x + self.params['backbone/insert_time/pos_embedding']
    for i in range(self.options['depth']):
      z = blocks.block(i, z)
    z = self.layer_norm('backbone/insert_time/norm', z).mean(axis=1)
    return x.mean(axis=1) + z if self.options['residual'] else z
