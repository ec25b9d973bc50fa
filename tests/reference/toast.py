"""TOAST: a second pass whose values carry top-down feedback on the first pass's output."""

import numpy as np

from reference import numeric
from reference.vit import ViT


class TOAST(ViT):
  """Shi et al. 2023, section 3: select, feed back, run again.

  w_n = clip(cos(X_n, xi), 0, 1), z = (w X) P; then z <- A_l z and t_l = B_l z from the last block
  to the first; the second pass adds W_v t_l + b_v to the values of block l.
  """

  def __call__(self, images):
    self.feedback = None
    x = self.final_norm(self.encode(self.embed(images)))
    z = self.select(x) @ self.transform()
    feedback = {}
    for i in reversed(self.layers):
      z = self.feed('a', i, z)
      feedback[i] = self.feed('b', i, z)
    self.feedback = feedback
    return super().__call__(images)

  def select(self, x):
    xi = self.params['side/xi']
    cosine = (x @ xi)[..., None] / (numeric.length(x, -1) * numeric.length(xi, -1))
    return numeric.clip(cosine, 0, 1) * x

  def transform(self):
    return np.eye(self.spec.width)

  def feed(self, name, i, z):
    return z @ self.params[f'side/{name}_kernel'][i]

  def project(self, i, name, x):
    y = super().project(i, name, x)
    if i == 'map' or name != 'value' or self.feedback is None:
      return y
    value = super().project(i, 'value', self.feedback[i])
    if not self.options['value_bias']:
      value = value - self.params[f'{self.path(i, "value")}/bias']
    return y + value


class TOASTLite(TOAST):
  """A_l and B_l are the identity and zero plus a low-rank product; P is trained."""

  def transform(self):
    return self.params['side/p_kernel']

  def feed(self, name, i, z):
    low_rank = (
      z @ self.params[f'side/{name}_down_kernel'][i] @ self.params[f'side/{name}_up_kernel'][i]
    )
    return low_rank + (z if name == 'a' else 0)
