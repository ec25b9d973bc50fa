"""Methods that add nothing and only say which of the backbone's own parameters train.

linear: none of them (linear probing): only the classifier trains.
full: all of them (full fine-tuning), class token, position embedding and MAP head included.
bitfit: every bias, L (7 d + m) + 2 d, and 6 d + m in a MAP head. Ben Zaken, Goldberg, Ravfogel:
  BitFit, ACL 2022, section 3, https://arxiv.org/abs/2106.10199.
last_k: the last k blocks, k (4 d^2 + 2 d m + 9 d + m), and the MAP head where there is one. Called
  partial-k in Jia et al.: Visual Prompt Tuning, ECCV 2022, https://arxiv.org/abs/2203.12119.
mlp_only, attention_only: the linear layers of all MLPs, L (2 d m + m + d), or of all attention,
  L (4 d^2 + 4 d), without the LayerNorms; one more of each in a MAP head.

last_k, mlp_only and attention_only are baselines in Mercea et al., CVPR 2024, Table 7,
https://arxiv.org/abs/2402.02887, which does not say what becomes of the MAP head and the final
norm. That the MAP head trains is our reading of its parameter counts: the last block and the MAP
head of ViT-g have 50.5 M (the paper: 50), and MLPs and attention agree only with it. 2 d more or
less do not show, so `final_norm` is an option: VPT's partial-k trains it.
"""

import functools

from losa_scenic.adapt_lib import inserts
from losa_scenic.adapt_lib.method import Method
from losa_scenic.common_lib import errors
from losa_scenic.model_lib.spec import BackboneSpec


def _everything(path: str) -> bool:
  del path
  return True


def _is_bias(path: str) -> bool:
  return path.rsplit('/', 1)[-1] == 'bias'


def _is_below(path: str, roots: tuple[str, ...]) -> bool:
  return path.startswith(roots)


def _is_linear(path: str, names: tuple[str, ...], map_head: bool) -> bool:
  root, *rest = path.split('/')
  return root in ('encoder', 'map_head')[: 1 + map_head] and any(name in rest for name in names)


def linear(spec: BackboneSpec) -> Method:
  """Linear probing."""
  del spec
  return Method()


def full(spec: BackboneSpec, *, token_keep: float = 1.0) -> Method:
  """Full fine-tuning, or training from scratch.

  Args:
    spec: the backbone.
    token_keep: share of the patch tokens that the encoder sees in training, drawn anew for every
      image (PatchDropout); 1 for all. Evaluation always uses all.

  Raises:
    errors.UserError: for a share outside (0, 1].
  """
  del spec
  if not 0 < token_keep <= 1:
    raise errors.UserError(f'token_keep must be in (0, 1], got {token_keep}.')
  drop = functools.partial(inserts.TokenDropout, keep=token_keep)
  dropping = token_keep < 1
  inserted = {'encoder': drop} if dropping else {}
  return Method(trains=_everything, inserts=inserted, drops_tokens=dropping)


def bitfit(spec: BackboneSpec) -> Method:
  """All biases: of linear layers, patch projection and MAP head, and the shifts of all norms."""
  del spec
  return Method(trains=_is_bias)


def last_k(spec: BackboneSpec, *, k: int = 1, final_norm: bool = False) -> Method:
  """The last blocks, and the MAP head where there is one.

  Args:
    spec: the backbone.
    k: how many blocks, in 1..depth (1 and 2 in the LoSA paper).
    final_norm: whether the final LayerNorm trains, too.

  Raises:
    errors.UserError: for a k out of range.
  """
  if not 1 <= k <= spec.depth:
    raise errors.UserError(f'last_k k must be in 1..{spec.depth}, got {k}.')
  first = spec.depth - k
  # All of them have one rule, which stacked layers can follow, too.
  roots = [f'encoder/layers_{i}/' for i in range(first, spec.depth)] if first else ['encoder/']
  roots += ['map_head/', 'norm/'] if final_norm else ['map_head/']
  trains = functools.partial(_is_below, roots=tuple(roots))
  return Method(trains=trains, unrolled=first > 0, first=first)


def mlp_only(spec: BackboneSpec, *, map_head: bool = True) -> Method:
  """The MLPs of all blocks.

  Args:
    spec: the backbone.
    map_head: whether the MLP of the MAP head trains, too; no effect without a MAP head.
  """
  del spec
  return Method(
    trains=functools.partial(_is_linear, names=('fc1', 'gate', 'fc2'), map_head=map_head)
  )


def attention_only(spec: BackboneSpec, *, map_head: bool = True) -> Method:
  """Query, key, value and output projection of all blocks.

  Args:
    spec: the backbone.
    map_head: whether those of the MAP head train, too (not its probe); no effect without one.
  """
  del spec
  names = (*inserts.QKV, 'out')
  return Method(trains=functools.partial(_is_linear, names=names, map_head=map_head))
