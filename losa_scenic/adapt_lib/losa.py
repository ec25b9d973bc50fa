"""LoSA: low-rank side adaptation.

With b_1 .. b_L the outputs of the frozen encoder's blocks and y_0 = b_L,

  y_i = g_i(b_i + y_{i-1}) + y_{i-1}                                            (Eq. 3)
  g(x) = alpha * (GELU(x W_d + c_d) W_u + c_u)                                   (Eq. 4)

where g_i mixes channels (W_d [d r]) and tokens (the same on x^T, W_d [n r]) in turn (Eq. 5). On
video a token mixer is the sum of a spatial one [n_s r], per frame, and a temporal one [n_t r], per
position (Eq. 6). y_L takes the place of b_L: frozen final norm, pooling, classifier. A class token,
which the paper's video models lack, belongs to every frame as it does to an image: where a clip has
but one, it takes part in the mixing of each, and what comes out for it is the mean over frames.

Mercea, Gritsenko, Schmid, Arnab: Time-, Memory- and Parameter-Efficient Visual Adaptation, CVPR
2024, section 3.3, https://arxiv.org/abs/2402.02887.

What the paper leaves open, and what is done here: the biases c are present, each g has one scalar
alpha, and the alternation runs over the side network's own index, starting with channels (all three
follow from the paper's parameter counts). W_u = 0 and alpha = 1 at the start, so that y_L = b_L
exactly while gradients are not zero. The GELU is the backbone's own. The large models of the paper
also train a rank-32 LoRA on the MAP head, which no sentence of it mentions: `map_head_lora_rank`.
"""

import functools

from losa_scenic.adapt_lib import inserts, ladder, mixers
from losa_scenic.adapt_lib.method import Method
from losa_scenic.common_lib import errors
from losa_scenic.model_lib import sites
from losa_scenic.model_lib.spec import BackboneSpec

# What the side network reads of each block, in the order of the residual stream (Table 4).
ACTIVATIONS = {'block': ('block',), 'mlp': ('mlp',), 'mhsa': ('attn',), 'both': ('attn', 'mlp')}
ADAPTORS = ('low_rank_mixer', 'low_rank_mlp', 'transformer')
Y0 = ('b_L', 'b_0')
MEMORY = ('auto', 'fast', 'balanced', 'smallest')
KERNELS = ('xla', 'pallas')


def build(
  spec: BackboneSpec,
  *,
  rank: int = 16,
  num_layers: int | None = None,
  adaptor: str = 'low_rank_mixer',
  mix_time: bool = True,
  activation: str = 'block',
  y0: str = 'b_L',
  alpha_init: float = 1.0,
  map_head_lora_rank: int = 0,
  transformer_width: int | None = None,
  memory: str = 'auto',
  kernel: str = 'xla',
) -> Method:
  """LoSA for a backbone.

  Args:
    spec: the backbone.
    rank: r of every mixer (4, 8, 16 in Table 1; 64 in the large-scale tables). The transformer
      has no use for it, nor for alpha_init.
    num_layers: k, how many evenly spaced blocks are tapped, the last always among them (Table 5);
      all of them when not given.
    adaptor: 'low_rank_mixer' (channels and tokens in turn), 'low_rank_mlp' (channels only) or
      'transformer' (LST's ladder, its MLPs as wide as the backbone's); Table 3.
    mix_time: False leaves the temporal token mixers out, on clips.
    activation: 'block', 'mlp', 'mhsa', or 'both' MHSA and MLP outputs in sequence, which doubles
      the side network (Table 4).
    y0: where the side network starts: 'b_L' or 'b_0', the embedded tokens (Table 6).
    alpha_init: value of every alpha before training; not 0, since W_u is 0 and no gradient would
      be left.
    map_head_lora_rank: rank of a LoRA on the five targets of the MAP head (query, key, value, out,
      and one path around its MLP); 0 for none.
    transformer_width: channels of the transformer; 48 when not given, as in the paper.
    memory: what training keeps of the outputs of blocks, see `side_memory`: 'fast', 'balanced',
      'smallest' or 'auto'.
    kernel: 'xla', or 'pallas' for a kernel that changes y in one pass over it, see `side_kernel`.
      Results are the same. For images, mixers of both axes and one device.

  Returns:
    The method. Trainable parameters without the classifier, for k taps (twice as many with 'both'):
    ceil(k/2) (2 d r + r + d + 1) + floor(k/2) (2 n r + r + n + 1) + 10 d map_head_lora_rank, where
    on clips n is that of a frame, and temporal mixers add floor(k/2) (2 n_t r + r + n_t + 1); those
    of the transformer stand in `ladder`.

  Raises:
    errors.UserError: for a value out of range.
  """
  errors.one_of('LoSA adaptor', adaptor, ADAPTORS)
  errors.one_of('LoSA activation', activation, ACTIVATIONS)
  errors.one_of('LoSA y0', y0, Y0)
  num_layers = spec.depth if num_layers is None else num_layers
  if rank < 1:
    raise errors.UserError(f'LoSA rank must be at least 1, got {rank}.')
  if not 1 <= num_layers <= spec.depth:
    raise errors.UserError(f'LoSA num_layers must be in 1..{spec.depth}, got {num_layers}.')
  if alpha_init == 0:
    raise errors.UserError('LoSA alpha_init must not be 0: with W_u = 0 nothing would ever train.')
  if map_head_lora_rank < 0:
    raise errors.UserError(f'LoSA map_head_lora_rank must not be negative: {map_head_lora_rank}.')
  if map_head_lora_rank and spec.pool != 'map':
    raise errors.UserError(
      f"LoSA map_head_lora_rank needs a backbone that pools by 'map'; this one: '{spec.pool}'."
    )
  if transformer_width is not None and adaptor != 'transformer':
    raise errors.UserError(f"LoSA transformer_width is for adaptor 'transformer', not '{adaptor}'.")
  if not mix_time and (not spec.frames or adaptor != 'low_rank_mixer'):
    raise errors.UserError(
      "LoSA mix_time=False has no effect: it is for clips and adaptor 'low_rank_mixer'."
    )
  errors.one_of('LoSA memory', memory, MEMORY)
  if adaptor == 'transformer' and memory != 'auto':
    raise errors.UserError(
      f"LoSA memory='{memory}' is for mixers; adaptor 'transformer' keeps what it reads."
    )
  errors.one_of('LoSA kernel', kernel, KERNELS)
  if kernel == 'pallas' and (spec.frames or adaptor != 'low_rank_mixer'):
    raise errors.UserError("LoSA kernel='pallas' is for images and adaptor 'low_rank_mixer'.")
  taps, collect = tap_indices(spec.depth, num_layers), ACTIVATIONS[activation]
  if kernel == 'pallas':
    _check_kernel(spec, rank, len(taps) * len(collect))
  if adaptor == 'transformer':
    width = 48 if transformer_width is None else transformer_width
    small = ladder.side_spec(spec, width, 'backbone', None)
    side = functools.partial(ladder.Ladder, small, taps, collect, start=y0)
  else:
    mix_tokens = adaptor == 'low_rank_mixer'
    side = functools.partial(
      mixers.Mixers,
      rank,
      taps,
      collect,
      mix_tokens,
      mix_time=mix_time,
      start=y0,
      alpha_init=alpha_init,
      gelu=spec.gelu,
      memory=memory,
      kernel=kernel,
      size=None if spec.frames and mix_tokens else (spec.tokens, spec.width),
    )
  low_rank = functools.partial(inserts.LowRank, rank=map_head_lora_rank)
  head: dict[sites.Where, sites.MakeInsert] = (
    dict.fromkeys(sites.MAP_HEAD_SITES, low_rank) if map_head_lora_rank else {}
  )
  exact = y0 == 'b_L' and adaptor != 'transformer'
  one_device = "LoSA kernel='pallas'" if kernel == 'pallas' else ''
  return Method(head, collect=collect, side=side, exact_at_init=exact, one_device=one_device)


def _check_kernel(spec: BackboneSpec, rank: int, mixers_: int) -> None:
  """Raises `UserError` if there is no group of mixers of both axes that makes all tokens."""
  groups = -(-mixers_ // mixers.group_size(rank))
  if mixers_ < 2 or (groups == 1 and spec.pool.startswith('cls')):
    raise errors.UserError(
      f"LoSA kernel='pallas' has no effect: {mixers_} mixers of rank {rank} are one group, "
      'which makes only what pooling reads, or mixes one axis. A larger rank makes more groups.'
    )


def tap_indices(depth: int, k: int) -> tuple[int, ...]:
  """0-based blocks tapped by k side layers: round(j L / k) - 1 for j = 1..k, halves up."""
  return tuple((2 * j * depth + k) // (2 * k) - 1 for j in range(1, k + 1))
