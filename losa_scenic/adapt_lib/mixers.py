"""The side network of LoSA: its weights, what it reads of the backbone, and which form is run."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from jaxtyping import Float, Num

from losa_scenic.adapt_lib import clip_mixers, mixer, mixer_loop, side_memory, tap_products
from losa_scenic.adapt_lib.group_weights import CHANNELS, TOKENS
from losa_scenic.adapt_lib.method import Run
from losa_scenic.adapt_lib.token_products import tokens_first
from losa_scenic.common_lib.types import Array
from losa_scenic.model_lib import attention
from losa_scenic.model_lib.encoder import Encoded


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
    kernel: 'xla', or 'pallas' for `side_kernel`; of images.
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
  kernel: str = 'xla'
  size: tuple[int, int] | None = None

  @nn.compact
  def __call__(
    self, run: Run, inputs: Num[Array, 'b *thw c'] | None, *, train: bool
  ) -> Float[Array, 'b ...']:
    if self.size is None:
      encoded = run.encode(inputs, train=train, read=self._rounded)
      y, stream = self._start(encoded), self._pick(encoded)
      mode = side_memory.choose(self.memory, y, len(stream))
      weights = self._weights_of_clips(encoded, run.scanned)
      y = clip_mixers.mix(weights, stream, y, encoded, self.gelu, mode)
    elif run.scanned and run.frozen and self.memory != 'smallest':
      y = self._scanned(run.encode(inputs, train=train), run.tokens_read)
    else:
      by_axis = _named_by_axis(self._each(self._sizes, run.scanned))
      mixers = mixer_loop.in_turn(self._axes, by_axis)
      encoded = self._read(run, inputs, train, mixers)
      y = tokens_first(self._start(encoded))
      y = mixer_loop.unrolled(self._form(y, run.tokens_read), mixers, y, self._pick(encoded))
      y = tokens_first(y)
    return run.features(y, train=train)

  def _rounded(self, layer: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a layer of clips: rounded as it comes, if it is to be."""
    if layer not in self.taps:
      return {}
    found = {site: values[site] for site in self.collect}
    return {
      site: b
      if side_memory.choose(self.memory, b, self._many) == 'fast'
      else tap_products.round_tokens(b)
      for site, b in found.items()
    }

  def _read(
    self, run: Run, inputs: Array | None, train: bool, mixers: Sequence[mixer.Weights]
  ) -> Encoded:
    """A pass of the encoder, each layer read by its mixers as it comes: `tap_products.Tap`s."""
    which = list(itertools.product(self.taps, self.collect))
    axes: dict[tuple[int, str], str] = dict(zip(which, self._axes, strict=True))
    downs: list[dict[str, Array]] = [{} for _ in range(self.taps[-1] + 1)]
    for (tap, site), own in zip(which, mixers, strict=True):
      downs[tap][site] = own.down
    twice = self.memory == 'smallest'

    def read(layer: int, down: Mapping[str, Array], values: Mapping[str, Any]) -> dict[str, Any]:
      found = {}
      for site in down:
        b = values[site]
        rounded = side_memory.choose(self.memory, b, len(which)) == 'balanced'
        tap = tap_products.read(b, down[site], axes[layer, site], rounded=rounded)
        if twice:
          seen = tap_products.product(tap, down[site], axes[layer, site])
          tap = tap_products.Tap(seen, None)
        found[site] = tap
      return found

    if twice:
      return run.encode_twice(inputs, read, downs)
    return run.encode(
      inputs,
      train=train,
      read=lambda layer, values: read(layer, downs[layer], values),
    )

  def _start(self, encoded: Encoded) -> Float[Array, 'b n d']:
    return encoded.tokens if self.start == 'b_L' else encoded.embedded

  def _pick(self, encoded: Encoded) -> list[Any]:
    """b_1 .. b_k, or what mixers have read of them."""
    return [encoded.layers[site][tap] for tap in self.taps for site in self.collect]

  def _scanned(self, encoded: Encoded, wanted: int | None) -> Float[Array, 'b m d']:
    """So many tokens of y_L, of images, from outputs of layers that are stacked."""
    y, outputs = tokens_first(self._start(encoded)), [encoded.layers[s] for s in self.collect]
    if len(self.taps) < len(outputs[0]):
      outputs = [each[np.asarray(self.taps)] for each in outputs]
    form = self._form(y, wanted)
    if attention.on_cpu():  # There layers are scanned to be compiled quickly, as pairs are.
      form = form._replace(size=2)
    weights = _named_by_axis(self._stacked(self._sizes))
    y = mixer_loop.scanned(form, weights, y, outputs, rounded=form.reversible)
    return tokens_first(y)

  def _form(self, y: Float[Array, 'n b d'], wanted: int | None) -> mixer_loop.Form:
    """How mixers of images are computed."""
    mode = side_memory.choose(self.memory, y, self._many)
    fused = self.kernel == 'pallas' and not attention.is_plain()
    return mixer_loop.Form(
      tuple(self._axes), self.gelu, group_size(self.rank), wanted, mode != 'fast', fused
    )

  @property
  def _many(self) -> int:
    """How many mixers, or pairs of one in space and one in time, there are."""
    return len(self.taps) * len(self.collect)

  @property
  def _axes(self) -> list[str]:
    """What each mixer mixes."""
    return [TOKENS if self.mix_tokens and i % 2 else CHANNELS for i in range(self._many)]

  @property
  def _sizes(self) -> dict[str, int]:
    """Of the axis of each kind of mixers of images."""
    n, d = self.size or (0, 0)
    return {'channel': d, 'token': n} if TOKENS in self._axes else {'channel': d}

  def _weights_of_clips(self, encoded: Encoded, stacked: bool) -> list[tuple[mixer.Weights, ...]]:
    """Those of all mixers: one of channels, or one in space and, if wanted, one in time."""
    times, height, width = encoded.grid
    sizes = {'channel': encoded.tokens.shape[2]}
    if TOKENS in self._axes:
      sizes['spatial'] = height * width + encoded.prefix // encoded.sequences
      if self.mix_time:
        sizes['temporal'] = times
    channel, *tokens = self._each(sizes, stacked).values()
    by_axis = {CHANNELS: [(own,) for own in channel], TOKENS: list(zip(*tokens, strict=True))}
    return mixer_loop.in_turn(self._axes, by_axis)

  def _each(self, sizes: Mapping[str, int], stacked: bool) -> dict[str, list[mixer.Weights]]:
    """The weights of all mixers by kind, made stacked or one by one."""
    if stacked:
      return {name: mixer.each(own) for name, own in self._stacked(sizes).items()}
    found: dict[str, list[mixer.Weights]] = {name: [] for name in sizes}
    counts = self._counts(sizes)
    for i in range(counts['channel']):
      make = mixer.LayerWeights(self.rank, self.alpha_init, name=f'layers_{i}')
      own = {name: size for name, size in sizes.items() if i < counts[name]}
      for name, weights in make(own).items():
        found[name].append(weights)
    return found

  def _stacked(self, sizes: Mapping[str, int]) -> dict[str, mixer.Weights]:
    """The weights of all mixers by kind, made stacked."""
    make = mixer.LayerWeights(self.rank, self.alpha_init, name='layers')
    return make(sizes, self._counts(sizes))

  def _counts(self, sizes: Mapping[str, int]) -> dict[str, int]:
    """How many mixers of each kind there are."""
    return {name: self._axes.count(_axis(name)) for name in sizes}


def _axis(name: str) -> str:
  """What mixers of a kind mix."""
  return CHANNELS if name == 'channel' else TOKENS


def _named_by_axis(each: Mapping[str, Any]) -> dict[str, Any]:
  """What kinds of mixers have, of which there is one an axis, by axis."""
  return {_axis(name): own for name, own in each.items()}


def group_size(rank: int) -> int:
  """How many mixers of images are computed through their hidden units: see `mixer_group`.

  More of them read and write y less often, but their hidden units meet each other more often; as
  many as make about a hundred units along each axis.
  """
  return 2 * min(6, max(2, 96 // rank))
