"""Methods that make another linear map or norm of one: LoRA, DoRA, VeRA, FacT, SSF, RepAdapter."""

import numpy as np

from reference import numeric
from reference.vit import ViT


class LoRA(ViT):
  """y = W x + b + s B A x (Hu et al. 2022, section 4.1).

  Three readings: A and B for each target; one A for query, key and value, whose B has 3 d rows
  (Zhang et al. 2022); and 'mlp', one d -> r -> d beside a whole MLP (LoSA's baseline). The MAP
  head's linears are targets as well if asked for.
  """

  def targets(self):
    return self.options['targets'].replace('qkv', 'query,key,value').split(',')

  def delta(self, i, name, x):
    if name not in self.targets() or (i == 'map' and not self.options['map_head']):
      return 0
    if self.options['shared_down']:
      return self.scale() * x @ self.shared_down(i, name)
    p = self.insert(i, name)
    return self.scale() * x @ p['a'] @ p['b']

  def shared_down(self, i, name):
    if i != 'map':
      p = self.insert(i, 'query+key+value')
      return p['a'] @ p[f'b_{name}']
    if name == 'query':  # The probe is another input than the tokens.
      p = self.insert(i, 'query')
      return p['a'] @ p['b']
    p = self.insert(i, 'key+pool_value')
    return p['a'] @ p[f'b_pool_{name}']

  def scale(self):
    return (self.options['alpha'] or self.options['rank']) / self.options['rank']

  def project(self, i, name, x):
    return super().project(i, name, x) + self.delta(i, name, x)

  def mlp(self, i, h):
    return super().mlp(i, h) + self.delta(i, 'mlp', h)


class DoRA(LoRA):
  """y = (m / |V|) (V x) + b with V = W + s B A, |V| per output unit and detached (Liu et al. 2024).

  Section 4.3 there treats the norm as a constant. The parameter is m - |W|, 0 at the start.
  """

  def project(self, i, name, x):
    if name not in self.targets() or i == 'map':
      return ViT.project(self, i, name, x)
    p, path = self.insert(i, name), self.path(i, name)
    w = self.params[f'{path}/kernel']
    v = w + self.scale() * p['a'] @ p['b']
    norm = numeric.detached(numeric.length(v, axis=0))
    magnitude = numeric.length(w, axis=0) + p['magnitude_bias']
    return x @ (v * (magnitude / norm)) + self.params[f'{path}/bias']

  def mlp(self, i, h):
    return ViT.mlp(self, i, h)


class VeRA(ViT):
  """y = W x + c + b * (B (d * (A x))), A and B one frozen pair for all (Kopiczko et al. 2024)."""

  def project(self, i, name, x):
    y = super().project(i, name, x)
    if i == 'map' or name not in self.options['targets'].replace('qkv', 'query,key,value').split(
      ','
    ):
      return y
    p, shared = self.insert(i, name), self.table('shared')
    a = shared['a'][: x.shape[-1]]
    b = shared['b'][:, : y.shape[-1]]
    return y + (x @ a * p['lambda_d']) @ b * p['lambda_b']


class FacT(ViT):
  """Increments s U C_j V of 4 + 2 m/d slices [d d] per block (Jie and Deng 2023, section 3.2).

  One slice for each of query, key, value and out, and one for each d of the m hidden channels of
  fc1 and of fc2 (what is left over of m is not adapted); U and V are the same in all blocks.
  """

  def cores(self, i, name):
    raise NotImplementedError

  def project(self, i, name, x):
    y = super().project(i, name, x)
    if i == 'map':
      return y
    p, d, scale = self.table('shared'), self.spec.width, self.options['scale']
    cores = self.cores(i, name)
    if name == 'fc2':
      parts = [x[..., j * d : (j + 1) * d] @ p['u'] @ c @ p['v'] for j, c in enumerate(cores)]
      return y + scale * sum(parts)
    new = scale * np.concatenate([x @ p['u'] @ c @ p['v'] for c in cores], axis=-1)
    return y + np.pad(new, [(0, 0), (0, 0), (0, y.shape[-1] - new.shape[-1])])


class FacTTT(FacT):
  """Tensor-Train: a free core for every slice (Eq. 5)."""

  def cores(self, i, name):
    return self.insert(i, name)['cores']


class FacTTK(FacT):
  """Tucker: C_j = sum_k P[k, j] G[:, :, k] (Eq. 8)."""

  def cores(self, i, name):
    core = self.params['shared/core']
    cores = [core @ p for p in self.insert(i, name)['p']]
    if self.options['tk_layout'] == 'clean' or name not in ('fc1', 'fc2'):
      return cores
    # As released: the r x r x j block is read row by row as r x (j r), for fc2 as its transpose.
    rank = len(core)
    flat = np.stack(cores, axis=-1).reshape(rank, -1)
    parts = [flat[:, j * rank : (j + 1) * rank] for j in range(len(cores))]
    return [part.T for part in parts] if name == 'fc2' else parts


class SSF(ViT):
  """gamma * z + beta after every operation (Lian et al. 2022, Eq. 3)."""

  def affine(self, p, z):
    return z * p['scale'] + p['shift']

  def patch_embed(self, patches):
    return self.affine(self.table('backbone/insert_patch'), super().patch_embed(patches))

  def norm1(self, i, x):
    return self.affine(self.insert(i, 'norm1'), super().norm1(i, x))

  def norm2(self, i, u):
    return self.affine(self.insert(i, 'norm2'), super().norm2(i, u))

  def project(self, i, name, x):
    y = super().project(i, name, x)
    return y if i == 'map' else self.affine(self.insert(i, name), y)

  def final_norm(self, x):
    return self.affine(self.table('backbone/insert_norm'), super().final_norm(x))


class RepAdapter(ViT):
  """z + s (G (W_d z + b_d) + b_g), G in groups, after the norms (Luo et al. 2023, Eq. 5, 7)."""

  def adapt(self, p, z):
    hidden = z @ p['down_kernel'] + p['down_bias']
    groups = self.options['groups']
    size, out = hidden.shape[-1] // groups, z.shape[-1] // groups
    up = p['up_kernel'].reshape(groups, size, out)
    parts = [hidden[..., g * size : (g + 1) * size] @ up[g] for g in range(groups)]
    return z + self.options['scale'] * (np.concatenate(parts, axis=-1) + p['up_bias'])

  def norm1(self, i, x):
    return self.adapt(self.insert(i, 'query+key+value/delta'), super().norm1(i, x))

  def norm2(self, i, u):
    h = super().norm2(i, u)
    if self.options['placement'] == 'attn':
      return h
    return self.adapt(self.insert(i, 'fc1/delta'), h)
