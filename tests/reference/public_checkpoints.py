"""Checkpoints of public families (golden/backbones), put through all that is claimed of them.

`FAMILIES` groups the cases as docs/backbones.md does; `check` measures one of them.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from losa_scenic.adapt_lib import methods
from losa_scenic.adapt_lib.method import BACKBONE, combine, partition
from losa_scenic.common_lib import trees
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.vit import ViT
from losa_scenic.weights_lib import checkpoint

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
INDEX = json.loads((GOLDEN / 'backbones' / 'INDEX.json').read_text())
RESIZED = np.load(GOLDEN / 'backbones_resized.npz')
BOUND = 1e-5  # Of the largest value.
CLASSES = 3

# Public family -> cases.
FAMILIES = {
  'ViT (AugReg, ImageNet-21k)': (
    *('npz_augreg', 'npz_pre_logits', 'timm_vit_augreg', 'hf_vit', 'hf_vit_classifier'),
  ),
  'ViT of timm (SO-150M2, registers, RoPE)': (
    *('timm_vit_so150m2', 'timm_vit_reg_gap', 'timm_vit_rope_reg'),
  ),
  'I-JEPA': ('timm_vit_gap',),
  'DeiT': ('timm_deit',),
  'DeiT, distilled': ('orig_deit_distilled', 'timm_deit_distilled', 'hf_deit_teacher'),
  'DeiT III': ('timm_deit3',),
  'CLIP': (*('open_clip_quickgelu', 'timm_vit_clip_quickgelu', 'hf_clip_vision'),),
  'OpenCLIP (LAION)': ('open_clip', 'timm_vit_clip', 'hf_clip'),
  'SigLIP': ('open_clip_siglip', 'hf_siglip', 'hf_siglip_vision'),
  'SigLIP 2': ('timm_siglip', 'timm_siglip_tanh', 'hf_siglip2_naflex'),
  'DINOv2': ('timm_dinov2', 'hf_dinov2'),
  'DINOv2, registers': ('orig_dinov2', 'hf_dinov2_registers'),
  'DINOv2, SwiGLU (giant)': ('orig_dinov2_swiglu', 'timm_dinov2_reg_swiglu', 'hf_dinov2_swiglu'),
  'DINOv3': ('orig_dinov3', 'timm_dinov3', 'hf_dinov3'),
  'DINOv3, SwiGLU (S+, H+, 7B)': ('orig_dinov3_swiglu', 'timm_dinov3_swiglu', 'hf_dinov3_gated'),
  'EVA-CLIP': ('timm_eva_giant_clip',),
  'EVA-02': ('timm_eva02_tiny', 'timm_eva02_base'),
  'EVA-02-CLIP': ('timm_eva02_base_clip', 'timm_eva02_enormous_clip'),
  'MAE': ('orig_mae', 'timm_mae', 'hf_mae', 'hf_mae_pretraining'),
  'BEiT': ('hf_beit', 'hf_beit_classifier', 'hf_beit_shared'),
  'BEiT v2': ('orig_beitv2', 'orig_beitv2_pretrained', 'timm_beitv2'),
  'BEiT-3': ('timm_beit3',),
  'AIMv2': ('remote_aimv2', 'timm_aimv2', 'hf_aimv2'),
  'InternViT 300M': ('timm_intern300m', 'hf_internvl'),
  'InternViT 6B': ('remote_internvit_6b', 'hf_internvl_6b'),
}
_KINDS = {
  'orig': "the authors' file, computed by {}",
  'remote': "the authors' file on the Hub, computed by {}",
  'npz': 'npz of vision_transformer, computed by {}',
}


def source(case: str) -> str:
  """Who writes such files, with the version of the library that computed what is compared."""
  kind = _KINDS.get(case.split('_')[0], '{}')
  return kind.format(INDEX[case]['library'])


def rows() -> dict[tuple[str, str], list[str]]:
  """(family, source) -> cases: the rows of docs/backbones.md."""
  found: dict[tuple[str, str], list[str]] = {}
  for family, cases in FAMILIES.items():
    for case in cases:
      found.setdefault((family, source(case)), []).append(case)
  return found


@dataclasses.dataclass(frozen=True)
class Result:
  """What was found of one case. Errors are relative to the largest value.

  Attributes:
    wrong: fields of the detected spec that are not what INDEX.json says: {field: (have, want)}.
    blocks: largest error of any block's output.
    pooled: largest error of the pooled features.
    resized: largest error of the last block at another input size; None where no library was asked.
    untouched: whether resizing left all but positions, and positions of leading tokens, alone.
    losses: of LoSA on a fixed batch at another input size, before each step.
    moved: whether one step changed the side network.
  """

  wrong: dict
  blocks: float
  pooled: float
  resized: float | None
  untouched: bool
  losses: tuple[float, ...]
  moved: bool

  def claims(self) -> dict[str, bool]:
    """Column of docs/backbones.md -> whether it holds."""
    return {
      'loads': not self.wrong,
      'blocks': self.blocks < BOUND,
      'pooled': self.pooled < BOUND,
      'resized': self.untouched and (self.resized is None or self.resized < BOUND),
      'LoSA trains': self.moved and max(self.losses[-2:]) < 0.7 * self.losses[0],
    }


def open_case(case: str) -> checkpoint.Checkpoint:
  """The case's checkpoint; what no file of it says is given by hand."""
  says, path = INDEX[case], GOLDEN / 'backbones' / case
  files = [name for name in says['files'] if not name.endswith('.json')]
  if len(files) == 1:
    path /= files[0]
  return checkpoint.open_checkpoint(path, {field: says[field] for field in says['needs']})


def leaves_of(opened: checkpoint.Checkpoint) -> dict[str, np.ndarray]:
  """{path: value} in float32."""
  return {path: np.asarray(opened.read(path), np.float32) for path in opened.shapes}


def relative(have, want) -> float:
  """Largest difference by the largest value; infinite for another shape."""
  if have.shape != want.shape or not np.isfinite(have).all():
    return float('inf')
  return float(np.abs(have - want).max() / np.abs(want).max())


def outputs(opened: checkpoint.Checkpoint, leaves, images):
  """Outputs of every block [depth b n d] and pooled features [b d]."""
  with jax.default_matmul_precision('highest'):
    blocks, pooled = _forward(_computed(opened.spec))(trees.unflatten(leaves), images)
  return np.asarray(blocks), np.asarray(pooled)


def check(case: str) -> Result:
  """Measures everything."""
  opened = open_case(case)
  leaves, want = leaves_of(opened), np.load(GOLDEN / 'backbones' / case / 'expected.npz')
  blocks, pooled = outputs(opened, leaves, want['image'])
  side, images, tokens = _elsewhere(case, opened)
  losses, moved, have = _train(*resized(opened, leaves, side), images)
  return Result(
    wrong=_wrong(opened.spec, INDEX[case]),
    blocks=max(map(relative, blocks, want['blocks'])),
    pooled=relative(pooled, want['pooled']),
    resized=None if tokens is None else relative(have[: len(tokens)], tokens),
    untouched=_untouched(opened, leaves),
    losses=losses,
    moved=moved,
  )


def resized(opened: checkpoint.Checkpoint, leaves, side: int):
  """Spec and leaves for inputs of that many patches per side."""
  spec = dataclasses.replace(opened.spec, image_size=side * opened.spec.patch)
  new = {p: checkpoint.resized(p, leaf, opened.spec, spec) for p, leaf in leaves.items()}
  return spec, new


def _wrong(spec, says) -> dict:
  want = {k: tuple(v) if isinstance(v, list) else v for k, v in says.items() if hasattr(spec, k)}
  return {k: (getattr(spec, k), v) for k, v in want.items() if getattr(spec, k) != v}


def _elsewhere(case: str, opened: checkpoint.Checkpoint):
  """Another side in patches, images of it, and the last block's tokens of the first, if known."""
  tokens, side = None, opened.spec.grid[1] + 2
  if f'{case}/image' in RESIZED:
    first, tokens = (RESIZED[f'{case}/{name}'] for name in ('image', 'tokens'))
    side = first.shape[1] // opened.spec.patch
  size = side * opened.spec.patch
  images = np.random.default_rng(0).standard_normal((4, size, size, 3)).astype(np.float32)
  if tokens is not None:
    images[:1] = first
  return side, images, tokens


def _untouched(opened: checkpoint.Checkpoint, leaves) -> bool:
  """Whether resizing changes the rows of the grid, and nothing else."""
  prefix, (_, side, _) = opened.spec.prefix, opened.spec.grid
  for new_side in (side - 1, side + 2):
    _, new = resized(opened, leaves, new_side)
    for path, leaf in leaves.items():
      if path == 'pos_embedding':
        own, rows, have = slice(prefix), prefix + new_side**2, new[path][0]
        leaf = leaf[0]
      elif path.endswith('relative_bias'):
        own, rows, have = slice(-3, None), (2 * new_side - 1) ** 2 + 3, new[path]
      else:
        own, rows, have = slice(None), len(leaf), new[path]
      if len(have) != rows or not np.array_equal(have[own], leaf[own]):
        return False
  return True


def _computed(spec):
  """The spec without what the computation does not depend on: fewer programs to compile."""
  return dataclasses.replace(
    spec, name='', mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bicubic', position_resize=''
  )


@functools.cache
def _forward(spec):
  model = ViT(spec, {}, collect=('block',))

  def run(params, images):
    encoded = model.apply({'params': params}, images, method=ViT.encode)
    pooled = model.apply({'params': params}, encoded.tokens, method=ViT.features)
    return encoded.layers['block'], pooled

  return jax.jit(run)


@functools.cache
def _losa(spec):
  """Shapes of LoSA's own parameters and of Adam's state, and a step."""
  model = Adapted(spec, methods.build('losa', spec, {'rank': 2}), CLASSES)
  inputs = jax.ShapeDtypeStruct(model.input_shape(), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)['params']
  own, _ = partition(shapes, model.method)
  tx = optax.adam(3e-2)

  def loss(own, backbone, images, labels):
    params = combine(own, {BACKBONE: backbone})
    logits, seen = model.apply(
      {'params': params},
      images,
      train=True,
      capture_intermediates=lambda _, method: method == 'encode',
      mutable=['intermediates'],
    )
    (encoded,) = seen['intermediates'][BACKBONE]['encode']
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), encoded.tokens

  @jax.jit
  def step(own, state, *batch):
    (value, tokens), gradient = jax.value_and_grad(loss, has_aux=True)(own, *batch)
    updates, state = tx.update(gradient, state)
    return optax.apply_updates(own, updates), state, value, tokens

  return own, jax.eval_shape(tx.init, own), step


def _train(spec, leaves, images, steps: int = 12):
  """LoSA on a fixed batch: losses before each step, whether the first moved all, and tokens.

  All leaves, but the bias of a token mixer that none follows: it adds the same to all channels of a
  token, which the final norm takes away again. Tokens are the frozen backbone's last.
  """
  shapes, state, step = _losa(_computed(spec))
  rng = np.random.default_rng(1)
  own = jax.tree.map(lambda x: (0.05 * rng.standard_normal(x.shape)).astype(x.dtype), shapes)
  state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
  batch = trees.unflatten(leaves), images, np.arange(len(images)) % CLASSES
  start, losses, moved, tokens = trees.flatten(own), [], True, None
  for i in range(steps):
    with jax.default_matmul_precision('highest'):
      own, state, loss, tokens = step(own, state, *batch)
    losses.append(float(loss))
    if i == 0:
      counts = [path for path in start if not path.endswith('token/up_bias')]
      after = trees.flatten(own)
      moved = all(not np.array_equal(start[path], after[path]) for path in counts)
  return tuple(losses), moved, np.asarray(tokens)
