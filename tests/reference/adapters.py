"""Bottleneck modules inside the blocks."""

from reference import numeric
from reference.vit import ViT, bottleneck


class Adapter(ViT):
  """z + W_u act(W_d z + b_d) + b_u on the MLP's output, before the residual (Pfeiffer et al. 2021).

  Houlsby et al. 2019 have a second one on the attention's output.
  """

  def adapt(self, i, site, z):
    houlsby = self.options['placement'] == 'houlsby'
    if i == 'map' or (site == 'attn' and not houlsby):
      return z
    kinds = {'quick_gelu': numeric.quick_gelu, 'gelu_erf': numeric.gelu_erf, 'relu': numeric.relu}
    activation = kinds[self.options['activation'] or ('gelu_erf' if houlsby else 'quick_gelu')]
    return z + bottleneck(self.insert(i, f'{site}/delta'), z, activation)

  def attention(self, i, h, queries=None):
    return self.adapt(i, 'attn', super().attention(i, h, queries))

  def mlp(self, i, h):
    return self.adapt(i, 'mlp', super().mlp(i, h))


class AdaptFormer(ViT):
  """u + MLP(LN u) + s (W_u relu(W_d u + b_d) + b_u) (Chen et al. 2022, Eq. 2-4), no norm inside."""

  def block(self, i, x):
    u = x + self.attention(i, self.norm1(i, x))
    beside = bottleneck(self.insert(i, 'mlp_block/delta'), u, numeric.relu)
    return u + self.mlp(i, self.norm2(i, u)) + self.options['scale'] * beside


class Convpass(ViT):
  """s C(h) beside attention and MLP, C = W_u q(conv3x3(q(W_d h))) (Jie and Deng 2022, Eq. 5-6).

  The class token is an image of one pixel: only the centre of the kernel meets it.
  """

  sites = ('attn', 'mlp')

  def bypass(self, i, site, h):
    if i == 'map' or site not in self.sites:
      return 0
    p = self.insert(i, f'{site}/delta')
    first, grid, last = self.split(numeric.quick_gelu(h @ p['down_kernel'] + p['down_bias']))
    kernel = p['conv/kernel']
    centre = kernel[kernel.shape[0] // 2, kernel.shape[1] // 2]
    frames = grid.reshape(-1, *grid.shape[2:])
    grid = numeric.convolve(frames, kernel).reshape(grid.shape)
    hidden = self.join(first @ centre, grid, last @ centre) + p['conv/bias']
    y = numeric.quick_gelu(hidden) @ p['up_kernel'] + p['up_bias']
    return self.options['scale'] * y

  def attention(self, i, h, queries=None):
    return super().attention(i, h, queries) + self.bypass(i, 'attn', h)

  def mlp(self, i, h):
    return super().mlp(i, h) + self.bypass(i, 'mlp', h)


class ConvpassAttn(Convpass):
  sites = ('attn',)


class STAdapter(ViT):
  """x + W_u DWConv3D(W_d x + b_d) + b_u before the block's norms (Pan et al. 2022, Eq. 4).

  Grid tokens alone. The released code has no activation, the paper's equation has one.
  """

  def adapt(self, p, x):
    first, grid, last = self.split(x)
    hidden = grid @ p['down_kernel'] + p['down_bias']
    hidden = numeric.depthwise(hidden, p['conv/kernel']) + p['conv/bias']
    if self.options['activation'] == 'relu':
      hidden = numeric.relu(hidden)
    return self.join(first, grid + hidden @ p['up_kernel'] + p['up_bias'], last)

  def block(self, i, x):
    if self.options['placement'] == 'both':
      x = self.adapt(self.insert(i, 'attn_block/delta'), x)
    u = x + self.attention(i, self.norm1(i, x))
    u = self.adapt(self.insert(i, 'mlp_block/delta'), u)
    return u + self.mlp(i, self.norm2(i, u))


class AdapterPlus(ViT):
  """y + s * (W_u gelu(W_d y + b_d) + b_u) after the block, s per channel (Steitz and Roth 2024)."""

  def block(self, i, x):
    y = super().block(i, x)
    p = self.insert(i, 'block/delta')
    return y + p['scale'] * bottleneck(self.insert(i, 'block/delta/delta'), y, numeric.gelu_erf)
