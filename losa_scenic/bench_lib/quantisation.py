"""How far the features of a quantised backbone are from those in float32, block by block.

Of every block's output, tokens of all images: the mean cosine between a token and its float32 self,
and the relative error |a - b| / |b| of all of them together. Of the pooled features, which a linear
classifier sees, the same.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from losa_scenic.common_lib import compiler, errors, trees
from losa_scenic.common_lib.types import Array, Params
from losa_scenic.dataset_lib import dataset_utils, datasets
from losa_scenic.model_lib import quantised
from losa_scenic.model_lib.spec import BackboneSpec
from losa_scenic.model_lib.vit import ViT
from losa_scenic.weights_lib import backbones

DRAWN = ('sprites', 'digits')  # Sets that need no files.
_BATCH = 16
_TINY = 1e-30

Outputs = tuple[list[Array], Array]  # Of all blocks [b n d], and the pooled features [b d].


def report(
  backbone: str, kinds: Sequence[str], images: str = 'sprites', count: int = 64
) -> Iterator[str]:
  """Measures kinds of quantisation on test images of a set, and says so in markdown.

  Args:
    backbone: as a config names it.
    kinds: some of `quantised.KINDS`.
    images: one of `DRAWN`, or files that `dataset_name='auto'` would find.
    count: how many images.

  Yields:
    Paragraphs.

  Raises:
    errors.UserError: for an unknown kind or backbone, a backbone of clips, or no images.
  """
  for kind in kinds:
    errors.one_of('kind', kind, quantised.KINDS)
  errors.check_at_least('count', count, 1)
  found = backbones.find(backbone)
  if found.spec.frames:
    raise errors.UserError(f"Backbone '{backbone}' is for clips: this measures images.")
  random = ' with random weights, which say little' if found.weights is None else ''
  batches = list(_batches(images, found.spec, count))
  yield f'Backbone {backbone}{random}; {sum(map(len, batches))} test images of {images}.'
  floats = Features(found, None)
  want = [floats(batch) for batch in batches]
  stored, sums = {'float32': floats.stored_bytes}, {}
  for kind in kinds:
    features = Features(found, kind)
    stored[kind] = features.stored_bytes
    sums[kind] = sum(
      np.asarray(_compare(features(batch), w), np.float64)
      for batch, w in zip(batches, want, strict=True)
    )
  yield _sizes(stored)
  yield _table(sums)


class Features:
  """images uint8 [b h w 3] -> outputs of all blocks, and pooled features; one kind of weights.

  Attributes:
    stored_bytes: of the linear layers of all blocks.
  """

  def __init__(self, backbone: backbones.Backbone, kind: str | None):
    """Loads the weights, those of a preset at random, and quantises them; None: float32."""
    model = ViT(backbone.spec, {}, collect=('block',), quantisation=kind)
    if backbone.weights is None:
      shape = (1, *backbone.spec.input_shape)
      params = jax.jit(lambda key: model.init(key, jnp.zeros(shape)))(jax.random.key(0))['params']
    else:
      params = backbones.load(backbone, stack=False, dtype=lambda _: jnp.float32, quantisation=kind)

    def outputs(model: ViT, images: Array) -> Outputs:
      encoded = model.encode(images)
      return list(encoded.layers['block']), model.features(encoded.tokens)

    self.stored_bytes = _stored_bytes(params)
    self._params = params
    self._run: Callable[..., Outputs] = jax.jit(
      lambda params, images: model.apply({'params': params}, images, method=outputs),
      compiler_options=compiler.options(kind),
    )

  def __call__(self, images: np.ndarray) -> Outputs:
    """Runs the backbone; see the class."""
    return self._run(self._params, images)


def _stored_bytes(params: Params) -> int:
  """Bytes of the kernels of blocks with their scales, int4 as a GPU stores it."""
  kernels = {
    path: leaf
    for path, leaf in trees.flatten(params).items()
    if quantised.is_kernel(path.removesuffix('_scale'))
  }
  return sum(leaf.size // 2 if leaf.dtype == jnp.int4 else leaf.nbytes for leaf in kernels.values())


def _batches(images: str, spec: BackboneSpec, count: int) -> Iterator[np.ndarray]:
  """The first test images, uint8 [b h w 3]."""
  name, options = (images, {}) if images in DRAWN else (datasets.AUTO, {'root': images})
  dataset = datasets.build_dataset(
    name,
    batch_size=_BATCH,
    eval_batch_size=_BATCH,
    image_size=spec.image_size,
    interpolation=spec.interpolation,
    dataset_configs=options,
  )
  left = count
  for batch in dataset_utils.iterate(dataset.test_ds):
    real = batch['inputs'][np.asarray(batch['batch_mask']) > 0][:left]
    if not left:
      break
    left -= len(real)
    yield real


@jax.jit
def _compare(have: Outputs, want: Outputs) -> Float[Array, 'rows 4']:
  """A row for each block and one for the pooled features.

  Tokens, the sum of their cosines, of squared differences, and of squares.
  """

  def sums(a: Array, b: Array) -> Array:
    lengths = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    cosines = (a * b).sum(-1) / jnp.maximum(lengths, _TINY)
    return jnp.stack([jnp.asarray(cosines.size), cosines.sum(), ((a - b) ** 2).sum(), (b**2).sum()])

  return jnp.stack(
    [sums(a, b) for a, b in zip([*have[0], have[1]], [*want[0], want[1]], strict=True)]
  )


def _sizes(stored: Mapping[str, int]) -> str:
  """How much the linear layers take."""
  text = ', '.join(f'{kind} {size / 2**20:.2f}' for kind, size in stored.items())
  return f'Linear layers of all blocks, MiB: {text}.'


def _table(sums: Mapping[str, np.ndarray]) -> str:
  """Cosine and relative error of every block and of the pooled features."""
  lines = [
    '| after | ' + ' | '.join(f'{kind}: cosine | error' for kind in sums) + ' |',
    '|---|' + '---:|---:|' * len(sums),
  ]
  depth = len(next(iter(sums.values()))) - 1
  for i in range(depth + 1):
    cells = []
    for table in sums.values():
      tokens, cosine, difference, square = table[i]
      cells += [f'{cosine / tokens:.5f}', f'{100 * np.sqrt(difference / square):.2f} %']
    name = f'block {i + 1}' if i < depth else 'pooling'
    lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)
