"""Head2Toe: a linear classifier over features of all layers of the frozen backbone.

Every tap k gives a vector a_k of the image, and f = [a_1 / |a_1|, a_2 / |a_2|, ..] in R^D. With
F = target_size, tokens [n c] give their mean if c >= F; else the means over successive windows of
floor(n c / F) tokens, flattened, the tokens after the last whole window being left out.

  stage 1: cross-entropy + lambda sum_i |W_i|_2 over the rows of the classifier W [D classes]
  selection: the features with the largest |W_i|_2, over all taps together
  stage 2: a new classifier over those alone, each tap's part normalised anew, lambda = 0

Evci, Dumoulin, Larochelle, Mozer: Head2Toe: Utilizing Intermediate Representations for Better
Transfer Learning, ICML 2022, https://arxiv.org/abs/2201.03529, section 3; pooling as released at
https://github.com/google-research/head2toe. Trainable parameters: none but the classifier's.

A stage is a run, and `python -m losa_scenic.head2toe_select` stands between the two. A run without
options is stage 1 taken as the result (our reading): all features, and the lasso on them.

Taps: embedded tokens; of each block the outputs of norm1, attn, fc1 and mlp; the final norm; the
pooled features. The released ViT list also has the tokens before the position embedding, and the
normalised class token, which is the pooled features where a backbone pools by it. On which side of
the activation the released list taps the hidden layer is not known to us; here it is before (fc1).
The released classifier starts at random values, this framework's at 0.
"""

import functools
import pathlib
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Num

from losa_scenic.adapt_lib import selection as selection_lib
from losa_scenic.adapt_lib.method import HEAD, Method, Run
from losa_scenic.common_lib import errors, trees
from losa_scenic.common_lib.types import Array, Params
from losa_scenic.model_lib.spec import BackboneSpec

SITES = ('norm1', 'attn', 'fc1', 'mlp')
TARGET_SIZE = 512
GROUP_LASSO = 1e-4


def build(
  spec: BackboneSpec,
  *,
  target_size: int = TARGET_SIZE,
  group_lasso: float | None = None,
  selection: str | None = None,
) -> Method:
  """Head2Toe for a backbone.

  Args:
    spec: the backbone.
    target_size: F, about how many features a tap gives, at least 1 (512 and 8192 are published).
    group_lasso: lambda, not negative; when not given 1e-4 (the released default), or 0 with a
      selection.
    selection: file with the features to keep: a JSON file of `losa_scenic.head2toe_select`, whose
      backbone and target_size must be these, or a .npy file of indices; all when not given.

  Raises:
    errors.UserError: for a value out of range, or a selection that cannot be read or does not fit.
  """
  if target_size < 1:
    raise errors.UserError(f'Head2Toe target_size must be at least 1, got {target_size}.')
  if group_lasso is None:
    group_lasso = 0.0 if selection else GROUP_LASSO
  if not 0 <= group_lasso < float('inf'):
    raise errors.UserError(f'Head2Toe group_lasso must be at least 0, got {group_lasso}.')
  kept = None
  if selection:
    total = sum(tap_sizes(spec, target_size))
    kept = selection_lib.read(pathlib.Path(selection), identity(spec, target_size), total)
  return Method(
    collect=SITES,
    side=functools.partial(Head2Toe, depth=spec.depth, target_size=target_size, kept=kept),
    files='' if kept is None else trees.digest({'kept': np.asarray(kept)}),
    penalty=functools.partial(sum_of_row_norms, weight=group_lasso) if group_lasso else None,
    exact_at_init=False,
  )


def sum_of_row_norms(trainable: Params, *, weight: float = 1.0) -> Float[Array, '']:
  """weight * sum_i |W_i|_2 over the rows of the classifier, one for each feature."""
  # The classifier starts at 0, where the norm has no gradient: hence the 1e-12.
  squares = jnp.square(trainable[HEAD]['kernel']).sum(axis=1)
  return weight * jnp.sqrt(squares + 1e-12).sum()


def tap_sizes(spec: BackboneSpec, target_size: int) -> tuple[int, ...]:
  """How many features each tap gives, in the order of the concatenation."""

  def size(width: int) -> int:
    return spec.tokens // _window(spec.tokens, width, target_size) * width

  block = tuple(size(spec.mlp if site == 'fc1' else spec.width) for site in SITES)
  return (size(spec.width), *block * spec.depth, size(spec.width), spec.width)


def identity(spec: BackboneSpec, target_size: int) -> dict[str, Any]:
  """Of which features the indices of a selection are."""
  return {'method': 'head2toe', 'target_size': target_size, 'backbone': spec.to_json()}


def _window(tokens: int, width: int, target_size: int) -> int:
  """How many tokens are averaged to one."""
  return tokens if width >= target_size else max(1, tokens * width // target_size)


class Head2Toe(nn.Module):
  """Makes the features. No parameters.

  Attributes:
    depth: blocks of the backbone.
    target_size: F.
    kept: indices of the features that stay, in increasing order, or None for all.
  """

  depth: int
  target_size: int
  kept: tuple[int, ...] | None = None

  @nn.compact
  def __call__(
    self, run: Run, inputs: Num[Array, 'b *thw c'] | None, *, train: bool
  ) -> Float[Array, 'b features']:
    encoded = run.encode(inputs, train=train)
    normed = run.normed(encoded.tokens, train=train)
    blocks = [encoded.layers[site][i] for i in range(self.depth) for site in SITES]
    taps = [self._pool(tokens) for tokens in (encoded.embedded, *blocks, normed)]
    taps.append(run.pooled(normed, train=train).astype(jnp.float32))
    if self.kept is not None:
      taps = self._select(taps, np.asarray(self.kept))
    return jnp.concatenate([_unit(tap) for tap in taps], axis=1)

  def _pool(self, x: Float[Array, 'b n c']) -> Float[Array, 'b k']:
    b, n, c = x.shape
    window = _window(n, c, self.target_size)
    x = x[:, : n // window * window].astype(jnp.float32)
    return x.reshape(b, -1, window, c).mean(axis=2).reshape(b, -1)

  def _select(self, taps: list[Array], kept: np.ndarray) -> list[Array]:
    """The kept part of each tap; it has no entries where nothing was kept."""
    ends = np.cumsum([tap.shape[1] for tap in taps])
    parts = np.split(kept, np.searchsorted(kept, ends[:-1]))
    offsets = (0, *ends[:-1])
    return [tap[:, part - at] for tap, part, at in zip(taps, parts, offsets, strict=True)]


def _unit(x: Float[Array, 'b k']) -> Float[Array, 'b k']:
  """x / |x|; a vector of zeros stays one."""
  squares = jnp.square(x).sum(axis=1, keepdims=True)
  return x / jnp.sqrt(jnp.maximum(squares, 1e-12))
