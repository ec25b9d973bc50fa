"""The side network of LoSA: its weights, what it reads of the backbone, and which form is run."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
from jaxtyping import Float, Num

from losa_scenic.adapt_lib import clip_mixers, mixer, mixer_group, side_memory, tap_products
from losa_scenic.adapt_lib.group_weights import CHANNELS, TOKENS
from losa_scenic.adapt_lib.method import Run
from losa_scenic.adapt_lib.token_products import tokens_first
from losa_scenic.common_lib.types import Array
from losa_scenic.model_lib.encoder import Encoded, read_layers


class Mixers(nn.Module):
  """The side network of LoSA: mixers of channels and of tokens in turn (Eq. 3 to 6).

  Attributes:
    rank: r of every mixer.
    taps: 0-based indices of the blocks that are read.
    collect: the site or sites read of each of those blocks.
    mix_tokens: alternate channel and token mixers; channel mixers only otherwise.
    mix_time: whether the token mixers of clips have a temporal part.
    start: 'b_L' or 'b_0'.
    alpha_init: alpha before training.
    gelu: 'tanh' or 'erf'.
    memory: see `side_memory`.
    size: (n, d) of inputs whose tokens, if any, are all mixed alike; None for clips, whose are
      mixed in space and in time.
  """

  rank: int
  taps: tuple[int, ...]
  collect: tuple[str, ...] = ('block',)
  mix_tokens: bool = True
  mix_time: bool = True
  start: str = 'b_L'
  alpha_init: float = 1.0
  gelu: str = 'tanh'
  memory: str = 'auto'
  size: tuple[int, int] | None = None

  @nn.compact
  def __call__(
    self, run: Run, inputs: Num[Array, 'b *thw c'] | None, *, train: bool
  ) -> Float[Array, 'b ...']:
    if self.size is None:
      encoded = run.encode(inputs, train=train, read=self._rounded)
      y, stream = self._start(encoded), self._pick(encoded)
      mode = side_memory.choose(self.memory, y, len(stream))
      weights = self._weights_of_clips(encoded)
      y = clip_mixers.mix(weights, stream, y, encoded, self.gelu, mode)
    else:
      weights = self._weights(self.size)
      encoded = self._read(run, inputs, train, weights)
      y = self._in_groups(self._start(encoded), self._pick(encoded), weights, run.tokens_read)
    return run.features(y, train=train)

  def _rounded(self, layer: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a layer of clips: rounded as it comes, if it is to be."""
    if layer not in self.taps:
      return {}
    found = {site: values[site] for site in self.collect}
    many = len(self.taps) * len(self.collect)
    return {
      site: b
      if side_memory.choose(self.memory, b, many) == 'fast'
      else tap_products.round_tokens(b)
      for site, b in found.items()
    }

  def _read(
    self, run: Run, inputs: Array | None, train: bool, weights: Sequence[mixer.Weights]
  ) -> Encoded:
    """A pass of the encoder, each layer read by its mixers as it comes: D_i b_i, tokens first."""
    which = list(itertools.product(self.taps, self.collect))
    downs: list[dict[str, Array]] = [{} for _ in range(self.taps[-1] + 1)]
    axes: dict[tuple[int, str], str] = dict(zip(which, self._axes, strict=True))
    for (tap, site), own in zip(which, weights, strict=True):
      downs[tap][site] = own.down

    def read(layer: int, down: Mapping[str, Array], values: Mapping[str, Any]) -> dict[str, Any]:
      found = {}
      for site in down:
        b = values[site]
        rounded = side_memory.choose(self.memory, b, len(which)) == 'balanced'
        found[site] = tap_products.read(b, down[site], axes[layer, site], rounded=rounded)
      return found

    def product(layer: int, taps: Mapping[str, Any], down: Mapping[str, Array]) -> dict[str, Array]:
      return {
        site: tap_products.product(tap, down[site], axes[layer, site])
        for site, tap in taps.items()
        if tap is not None
      }

    if self.memory == 'smallest':
      return run.encode_twice(
        inputs, lambda layer, down, values: product(layer, read(layer, down, values), down), downs
      )
    encoded = run.encode(
      inputs, train=train, read=lambda layer, values: read(layer, downs[layer], values)
    )
    values = read_layers(
      encoded.layers, len(downs), lambda layer, taps: product(layer, taps, downs[layer])
    )
    return dataclasses.replace(encoded, layers=values)

  def _start(self, encoded: Encoded) -> Float[Array, 'b n d']:
    return encoded.tokens if self.start == 'b_L' else encoded.embedded

  def _pick(self, encoded: Encoded) -> list[Any]:
    """b_1 .. b_k, or what mixers have read of them."""
    return [encoded.layers[site][tap] for tap in self.taps for site in self.collect]

  def _in_groups(
    self,
    y: Float[Array, 'b n d'],
    seen: Sequence[Array],
    weights: Sequence[mixer.Weights],
    wanted: int | None,
  ) -> Float[Array, 'b m d']:
    """So many tokens of y_L, of mixers of channels and of the tokens of images."""
    mode = side_memory.choose(self.memory, y, len(seen))
    y = mixer_group.mix(
      self._axes,
      weights,
      seen,
      tokens_first(y),
      self.gelu,
      group_size(self.rank),
      wanted,
      reversible=mode != 'fast',
    )
    return tokens_first(y)

  @property
  def _axes(self) -> list[str]:
    """What each mixer mixes."""
    many = len(self.taps) * len(self.collect)
    return [TOKENS if self.mix_tokens and i % 2 else CHANNELS for i in range(many)]

  def _weights(self, size: Sequence[int]) -> list[mixer.Weights]:
    """Those of all mixers of inputs of n tokens with d channels."""
    n, d = size
    return [
      self._make(f'layer_{i}_channel', d) if axis == CHANNELS else self._make(f'layer_{i}_token', n)
      for i, axis in enumerate(self._axes)
    ]

  def _weights_of_clips(self, encoded: Encoded) -> list[tuple[mixer.Weights, ...]]:
    """Those of all mixers: one of channels, or one in space and, if wanted, one in time."""
    times, height, width = encoded.grid
    sizes = {'spatial': height * width + encoded.prefix // encoded.sequences}
    if self.mix_time:
      sizes['temporal'] = times
    d = encoded.tokens.shape[2]
    return [
      (self._make(f'layer_{i}_channel', d),)
      if axis == CHANNELS
      else tuple(self._make(f'layer_{i}_{name}', size) for name, size in sizes.items())
      for i, axis in enumerate(self._axes)
    ]

  def _make(self, name: str, size: int) -> mixer.Weights:
    return mixer.MixerWeights(self.rank, self.alpha_init, name=name)(size)


def group_size(rank: int) -> int:
  """How many mixers of images are computed through their hidden units: see `mixer_group`.

  More of them read and write y less often, but their hidden units meet each other more often; as
  many as make about a hundred units along each axis.
  """
  return 2 * min(6, max(2, 96 // rank))
