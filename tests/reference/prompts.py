"""Methods that add tokens, keys or values."""

import numpy as np

from reference import numeric
from reference.vit import ViT, bottleneck


def append(x, prompts):
  return np.concatenate([x, numeric.repeat(prompts, len(x))], axis=1)


class VPTShallow(ViT):
  """Prompts join the sequence once, without position embedding (Jia et al. 2022, Eq. 4-5)."""

  def encode(self, x):
    return super().encode(append(x, self.params['backbone/insert_encoder/prompts']))


class VPTDeep(ViT):
  """Every block has its own prompts in the place of the last block's (Jia et al. 2022, Eq. 7)."""

  def block(self, i, x):
    return super().block(i, append(x, self.insert(i, 'block')['prompts']))[:, : self.tokens]


class PromptAccumulate(ViT):
  """Each of the first K blocks appends prompts, and nothing is ever removed.

  This is what reproduces the costs in Table 10 of the LoSA paper. Attention pooling sees them all.
  """

  def block(self, i, x):
    if i < (self.options['layers'] or self.spec.depth):
      x = append(x, self.insert(i, 'block')['prompts'])
    return super().block(i, x)

  def pooled_tokens(self, x):
    return x if self.options['map_sees_prompts'] else super().pooled_tokens(x)


class Express(ViT):
  """Output tokens akin to CLS, with residual prompts at their positions (Das et al. 2023).

  The residuals are added after LN1, the query, key and value projections, or the output projection
  of every block; the features are the mean of the output tokens after the final norm.
  """

  def encode(self, x):
    return super().encode(append(x, self.params['backbone/insert_encoder/prompts']))

  def add(self, i, site, y):
    if i == 'map' or site not in self.options['places'].replace('qkv', 'query,key,value'):
      return y
    own, added = y[:, : self.tokens], y[:, self.tokens :]
    return np.concatenate([own, added + self.insert(i, site)['residuals']], axis=1)

  def norm1(self, i, x):
    return self.add(i, 'norm1', super().norm1(i, x))

  def project(self, i, name, x):
    return self.add(i, name, super().project(i, name, x))

  def pool(self, x):
    return x[:, self.tokens :].mean(axis=1)


class Prefix(ViT):
  """softmax(q [k; P_k]^T / sqrt(d / h)) [v; P_v] in every block (Li and Liang 2021)."""

  def attend(self, i, q, k, v):
    if i != 'map':
      p = self.insert(i, 'attend')
      k, v = append(k, p['keys']), append(v, p['values'])
    return super().attend(i, q, k, v)


class ResTuning(Prefix):
  """Prefix in the attention, adapter beside the MLP, prompts per block (Jiang et al. 2023)."""

  def mlp(self, i, h):
    y = super().mlp(i, h)
    return y if i == 'map' else y + bottleneck(self.insert(i, 'mlp/delta'), h, self.gelu)

  def block(self, i, x):
    return super().block(i, append(x, self.insert(i, 'block')['prompts']))[:, : self.tokens]


class NOAH(ViT):
  """Prompts, LoRA on query, key, value and an adapter, each of its own size in every block.

  Zhang et al. 2022, section 3; a size of 0 leaves the module out, and a block without prompts of
  its own keeps those of the block before.
  """

  def block(self, i, x):
    prompts = self.insert(i, 'block').get('prompts')
    if prompts is not None:
      x = append(x[:, : self.tokens], prompts)
    return super().block(i, x)

  def project(self, i, name, x):
    y, p = super().project(i, name, x), self.insert(i, 'query+key+value')
    if i == 'map' or not p or name not in ('query', 'key', 'value'):
      return y
    return y + x @ p['a'] @ p[f'b_{name}']

  def mlp(self, i, h):
    y, p = super().mlp(i, h), self.insert(i, 'mlp/delta')
    return y + bottleneck(p, y, numeric.quick_gelu) if p and i != 'map' else y
