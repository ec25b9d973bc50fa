"""LST: ladder side-tuning, a small transformer that climbs beside the frozen backbone.

  h_0 = D_0 b_0,  h_l = Block_l(mu_l h_{l-1} + (1 - mu_l) D_l b_l),  mu_l = sigmoid(a_l / 0.1)

for every block l = 1 .. L of the backbone; pooling and classifier see U LN(h_L).

Sung, Cho, Bansal: LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning,
NeurIPS 2022, section 3, https://arxiv.org/abs/2206.06522. The parameter count stands in `ladder`.

The paper adapts language models. For a ViT the default is w = d / 8 and an MLP of 4 w, which has
the 2.38 M parameters that V-PETL-Bench lists for LST on ViT-B/16
(https://github.com/synbol/Parameter-Efficient-Transfer-Learning-Benchmark). The LST of the LoSA
paper (Mercea et al. 2024, Table 7) on ViT-g is width=48, mlp_dim='backbone'. Deviations: the side
blocks start from random weights, not from pruned ones of the backbone; every layer has a rung.
"""

import functools

from losa_scenic.adapt_lib import ladder
from losa_scenic.adapt_lib.method import Method
from losa_scenic.model_lib.spec import BackboneSpec


def build(
  spec: BackboneSpec,
  *,
  width: int | None = None,
  mlp_dim: int | str = '4w',
  heads: int | None = None,
) -> Method:
  """LST for a backbone.

  Args:
    spec: the backbone.
    width: w, channels of the side network; d / 8 (rounded down) when not given.
    mlp_dim: hidden channels of a side block's MLP: a number, '4w' for 4 times the width, or
      'backbone' for as many as the backbone's blocks have (what the LoSA paper compares with).
    heads: attention heads of the side blocks; when not given the largest divisor of the width that
      is not above the backbone's number of heads (12 for width 96 beside ViT-B, 16 for 48 beside
      ViT-g). No source names a number.

  Raises:
    errors.UserError: for a value out of range, or heads that do not divide the width.
  """
  side = functools.partial(
    ladder.Ladder,
    ladder.side_spec(spec, width, mlp_dim, heads),
    taps=tuple(range(spec.depth)),
  )
  return Method(collect=('block',), side=side, exact_at_init=False)
