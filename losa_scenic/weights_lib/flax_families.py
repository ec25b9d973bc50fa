"""Names of checkpoints from JAX: vision_transformer, big_vision, Scenic. See `family`."""

import dataclasses

from losa_scenic.weights_lib.family import Family, one


def _flax(attention: str, norms: tuple[str, str], mlp: str) -> dict[str, tuple[str, ...]]:
  names = {ours: f'{attention}/{ours}' for ours in ('query', 'key', 'value', 'out')}
  names |= {'norm1': norms[0], 'norm2': norms[1], 'fc1': f'{mlp}/Dense_0', 'fc2': f'{mlp}/Dense_1'}
  return one(**names)


_MAP_HEAD = {
  f'map_head/{ours}': f'MAPHead_0/{theirs}'
  for ours, theirs in {
    'probe': 'probe',
    **{n: f'MultiHeadDotProductAttention_0/{n}' for n in ('query', 'key', 'value', 'out')},
    'norm': 'LayerNorm_0',
    'fc1': 'MlpBlock_0/Dense_0',
    'fc2': 'MlpBlock_0/Dense_1',
  }.items()
}

# vision_transformer's first checkpoints, AugReg among them: names of flax before Linen.
PRE_LINEN = Family(
  name='vision_transformer',
  anchor='Transformer/encoderblock_0/LayerNorm_2/scale',
  layer='Transformer/encoderblock_{i}/',
  model={
    **one(**{'patch/proj': 'embedding', 'norm': 'Transformer/encoder_norm', 'cls': 'cls'}),
    'pos_embedding': ('Transformer/posembed_input/pos_embedding',),
  },
  block=_flax('MultiHeadDotProductAttention_1', ('LayerNorm_0', 'LayerNorm_2'), 'MlpBlock_3'),
  left_out=('head/*', 'pre_logits/*'),
  jax=True,
  resize='zoom_linear',
)

BIG_VISION = Family(
  name='big_vision, Scenic',
  anchor='Transformer/encoderblock_0/LayerNorm_1/scale',
  layer='Transformer/encoderblock_{i}/',
  model={
    **PRE_LINEN.model,
    'pos_embedding': ('pos_embedding', 'Transformer/posembed_input/pos_embedding'),
    **one(**_MAP_HEAD),
  },
  block=_flax('MultiHeadDotProductAttention_0', ('LayerNorm_0', 'LayerNorm_1'), 'MlpBlock_0'),
  left_out=('head/*', 'pre_logits/*', 'output_projection/*', 't', 'b', 'txt/*'),
  jax=True,
  resize='zoom_linear',
)

BIG_VISION_SCAN = dataclasses.replace(
  BIG_VISION,
  name='big_vision, scanned layers',
  anchor='Transformer/encoderblock/LayerNorm_1/scale',
  layer='Transformer/encoderblock/',
)
