"""What public checkpoints call the parameters of a ViT. See `family`; JAX ones: `flax_families`.

A pattern of `left_out` is matched against a name without the encoder's prefix. One that starts with
'/' is of what stands beside the encoder: it matches no name within it.
"""

from losa_scenic.weights_lib.family import Family, fused, one
from losa_scenic.weights_lib.flax_families import BIG_VISION, BIG_VISION_SCAN, PRE_LINEN

# Everything beside the vision tower in files of image-text models.
_OTHER_TOWERS = (
  '/text_model.*',
  '/text.*',
  '/text_projection*',
  '/visual_projection*',
  '/logit_scale',
  '/logit_bias',
  '/language_model.*',
  '/multi_modal_projector.*',
  '/mlp1.*',
)
# Heads of tasks.
_HEADS = (
  'classifier.*',
  'cls_classifier.*',
  'distillation_classifier.*',
  'lm_head.*',
)
# Buffers that follow from the geometry.
_BUFFERS = (
  '*relative_position_index',
  '*position_ids',
  '*rope.freqs_*',
  '*.bias_mask',
  '*.periods',
)

TIMM = Family(
  name='timm',
  anchor='blocks.0.norm1.weight',
  layer='blocks.{i}.',
  model={
    **one(**{'patch/proj': 'patch_embed.proj', 'patch_norm': 'patch_embed.norm'}),
    **one(cls='cls_token', pos_embedding='pos_embed', pre_norm='norm_pre'),
    'registers': ('reg_token', 'register_tokens', 'storage_tokens', 'dist_token'),
    'norm': ('norm', 'fc_norm'),
    **one(
      **{
        'map_head/probe': 'attn_pool.latent',
        'map_head/query': 'attn_pool.q',
        'map_head/key': 'attn_pool.kv[0/2]',
        'map_head/value': 'attn_pool.kv[1/2]',
        'map_head/out': 'attn_pool.proj',
        'map_head/norm': 'attn_pool.norm',
        'map_head/fc1': 'attn_pool.mlp.fc1',
        'map_head/fc2': 'attn_pool.mlp.fc2',
      }
    ),
  },
  block={
    **one(norm1='norm1', norm2='norm2', out='attn.proj'),
    'query': ('attn.qkv[0/3]', 'attn.q_proj'),
    'key': ('attn.qkv[1/3]', 'attn.k_proj'),
    'value': ('attn.qkv[2/3]', 'attn.v_proj'),
    'query/bias': ('attn.q_bias',),
    'value/bias': ('attn.v_bias',),
    'gate': ('mlp.fc1_g', 'mlp.w12[0/2]', 'mlp.w1'),
    'fc1': ('mlp.fc1_x', 'mlp.w12[1/2]', 'mlp.w2', 'mlp.fc1'),
    'fc2': ('mlp.fc2', 'mlp.w3'),
    'query_norm': ('attn.q_norm',),
    'key_norm': ('attn.k_norm',),
    'attn_norm': ('attn.norm', 'attn.inner_attn_ln'),
    'mlp_norm': ('mlp.norm', 'mlp.ffn_ln'),
    'attn_scale': ('ls1.gamma', 'gamma_1'),
    'mlp_scale': ('ls2.gamma', 'gamma_2'),
    'relative_bias': (
      'attn.relative_position_bias_table',
      '/rel_pos_bias.relative_position_bias_table',
    ),
  },
  left_out=(
    *('head.*', 'head_dist.*', 'pre_logits.*', 'mask_token', 'dino_head.*', 'ibot_head.*'),
    *('decoder_*', 'local_cls_norm.*', 'cls_pt_layers.*', *_HEADS, *_OTHER_TOWERS, *_BUFFERS),
  ),
  pooled_norms=('fc_norm',),
  masked={'key/bias': 'attn.qkv.bias_mask'},
  resize='bicubic_antialias',
  packed={'gate': ('mlp.fc1[0/2]',), 'fc1': ('mlp.fc1[1/2]',)},
)

TRANSFORMERS = Family(
  name='transformers',
  anchor='encoder.layer.0.layernorm_before.weight',
  layer='encoder.layer.{i}.',
  model={
    **one(cls='embeddings.cls_token', pos_embedding='embeddings.position_embeddings'),
    **one(**{'patch/proj': 'embeddings.patch_embeddings.projection'}),
    'registers': ('embeddings.register_tokens', 'embeddings.distillation_token'),
    # Of a model for masked images, the norm before its head is the encoder's last.
    'norm': ('layernorm', 'pooler.layernorm', '/layernorm'),
  },
  block={
    **one(norm1='layernorm_before', norm2='layernorm_after'),
    'query': ('attention.attention.query', 'attention.q_proj'),
    'key': ('attention.attention.key', 'attention.k_proj'),
    'value': ('attention.attention.value', 'attention.v_proj'),
    'out': ('attention.output.dense', 'attention.projection_layer'),
    'fc1': ('intermediate.dense', 'mlp.fc1'),
    'fc2': ('output.dense', 'mlp.fc2'),
    **one(query_norm='attention.q_norm', key_norm='attention.k_norm'),
    **one(attn_scale='lambda_1', mlp_scale='lambda_2'),
    'relative_bias': (
      'attention.attention.relative_position_bias.relative_position_bias_table',
      '/encoder.relative_position_bias.relative_position_bias_table',
    ),
  },
  left_out=(
    *('pooler.dense.*', 'embeddings.mask_token', 'decoder.*', *_HEADS),
    *(*_OTHER_TOWERS, *_BUFFERS),
  ),
  pooled_norms=('pooler.layernorm',),
)

DINOV2_TRANSFORMERS = Family(
  name='transformers (DINOv2)',
  anchor='encoder.layer.0.norm1.weight',
  layer='encoder.layer.{i}.',
  model=TRANSFORMERS.model,
  block={
    **one(norm1='norm1', norm2='norm2', out='attention.output.dense'),
    **one(query='attention.attention.query', key='attention.attention.key'),
    **one(value='attention.attention.value', gate='mlp.weights_in[0/2]'),
    'fc1': ('mlp.weights_in[1/2]', 'mlp.fc1'),
    'fc2': ('mlp.weights_out', 'mlp.fc2'),
    **one(attn_scale='layer_scale1.lambda1', mlp_scale='layer_scale2.lambda1'),
  },
  left_out=('embeddings.mask_token', *_HEADS, *_OTHER_TOWERS),
)

CLIP_TRANSFORMERS = Family(
  name='transformers (CLIP, SigLIP)',
  anchor='encoder.layers.0.layer_norm1.weight',
  layer='encoder.layers.{i}.',
  model={
    **one(cls='embeddings.class_embedding', pos_embedding='embeddings.position_embedding.weight'),
    **one(**{'patch/proj': 'embeddings.patch_embedding'}),
    **one(pre_norm='pre_layrnorm', norm='post_layernorm'),
    **one(
      **{
        'map_head/probe': 'head.probe',
        'map_head/out': 'head.attention.out_proj',
        'map_head/norm': 'head.layernorm',
        'map_head/fc1': 'head.mlp.fc1',
        'map_head/fc2': 'head.mlp.fc2',
      }
    ),
    **{
      f'map_head/{ours}/{leaf}': (f'head.attention.in_proj_{theirs}[{i}/3]',)
      for i, ours in enumerate(('query', 'key', 'value'))
      for leaf, theirs in (('kernel', 'weight'), ('bias', 'bias'))
    },
  },
  block={
    **one(norm1='layer_norm1', norm2='layer_norm2', fc1='mlp.fc1', fc2='mlp.fc2'),
    **one(query='self_attn.q_proj', key='self_attn.k_proj', value='self_attn.v_proj'),
    **one(out='self_attn.out_proj'),
  },
  left_out=(*_HEADS, *_OTHER_TOWERS, *_BUFFERS),
)

DINOV3_TRANSFORMERS = Family(
  name='transformers (DINOv3)',
  anchor='layer.0.norm1.weight',
  layer='layer.{i}.',
  model={
    **one(cls='embeddings.cls_token', registers='embeddings.register_tokens', norm='norm'),
    **one(**{'patch/proj': 'embeddings.patch_embeddings'}),
  },
  block={
    **one(norm1='norm1', norm2='norm2', query='attention.q_proj', key='attention.k_proj'),
    **one(value='attention.v_proj', out='attention.o_proj', gate='mlp.gate_proj'),
    **one(fc1='mlp.up_proj', fc2='mlp.down_proj'),
    **one(attn_scale='layer_scale1.lambda1', mlp_scale='layer_scale2.lambda1'),
  },
  left_out=('embeddings.mask_token', *_HEADS, *_OTHER_TOWERS),
)

AIMV2_TRANSFORMERS = Family(
  name='transformers (AIMv2)',
  anchor='encoder.layers.0.rms_norm1.weight',
  layer='encoder.layers.{i}.',
  model={
    **one(pos_embedding='embeddings.position_embedding.weight', norm='rms_norm'),
    **one(**{'patch/proj': 'embeddings.patch_embed', 'patch_norm': 'embeddings.rms_norm'}),
  },
  block={
    **one(norm1='rms_norm1', norm2='rms_norm2', query='attention.q_proj', key='attention.k_proj'),
    **one(value='attention.v_proj', out='attention.out_proj', gate='ffn.gate_proj'),
    **one(fc1='ffn.up_proj', fc2='ffn.down_proj'),
  },
  # Not 'head.*': the head of aimv2-*-lit pools by attention.
  left_out=(*_HEADS, *_OTHER_TOWERS, *_BUFFERS),
)

AIMV2 = Family(
  name='AIMv2',
  anchor='trunk.blocks.0.norm_1.weight',
  layer='trunk.blocks.{i}.',
  model={
    **one(pos_embedding='preprocessor.pos_embed', norm='trunk.post_trunk_norm'),
    **one(**{'patch/proj': 'preprocessor.patchifier.proj'}),
    **one(patch_norm='preprocessor.patchifier.norm'),
  },
  block={
    **one(norm1='norm_1', norm2='norm_2', out='attn.proj', gate='mlp.fc1', fc1='mlp.fc3'),
    **one(fc2='mlp.fc2'),
    **fused('attn.qkv'),
  },
  left_out=('head.weight', 'head.bias', *_HEADS, *_OTHER_TOWERS),
)

INTERNVIT = Family(
  name='InternViT',
  anchor='encoder.layers.0.attn.qkv.weight',
  layer='encoder.layers.{i}.',
  model={
    **one(cls='embeddings.class_embedding', pos_embedding='embeddings.position_embedding'),
    **one(**{'patch/proj': 'embeddings.patch_embedding'}),
  },
  block={
    **one(norm1='norm1', norm2='norm2', out='attn.proj', fc1='mlp.fc1', fc2='mlp.fc2'),
    **one(query_norm='attn.q_norm', key_norm='attn.k_norm', attn_scale='ls1', mlp_scale='ls2'),
    **fused('attn.qkv'),
  },
  left_out=(*_HEADS, *_OTHER_TOWERS),
)

OPEN_CLIP = Family(
  name='open_clip',
  anchor='transformer.resblocks.0.ln_1.weight',
  layer='transformer.resblocks.{i}.',
  model={
    **one(cls='class_embedding', pos_embedding='positional_embedding'),
    **one(**{'patch/proj': 'conv1'}, pre_norm='ln_pre', norm='ln_post'),
  },
  block={
    **one(norm1='ln_1', norm2='ln_2', out='attn.out_proj', fc1='mlp.c_fc', fc2='mlp.c_proj'),
    **one(attn_scale='ls_1.gamma', mlp_scale='ls_2.gamma'),
    **{
      f'{ours}/{leaf}': (f'attn.in_proj_{theirs}[{i}/3]',)
      for i, ours in enumerate(('query', 'key', 'value'))
      for leaf, theirs in (('kernel', 'weight'), ('bias', 'bias'))
    },
  },
  left_out=(
    *('proj', '/transformer.*', '/token_embedding.*', '/positional_embedding', '/ln_final.*'),
    *('/attn_mask', *_HEADS, *_OTHER_TOWERS),
  ),
  resize='bicubic_antialias',
)

FAMILIES = (
  TIMM,
  TRANSFORMERS,
  DINOV2_TRANSFORMERS,
  CLIP_TRANSFORMERS,
  DINOV3_TRANSFORMERS,
  AIMV2_TRANSFORMERS,
  AIMV2,
  INTERNVIT,
  OPEN_CLIP,
  PRE_LINEN,
  BIG_VISION,
  BIG_VISION_SCAN,
)

# Family -> {pattern of own names: why a model with such tensors is not read}.
REFUSED = {
  family.name: {'head.*': 'its head pools by attention, as that of aimv2-*-lit, which is not read'}
  for family in (AIMV2_TRANSFORMERS, AIMV2)
}


def names() -> list[str]:
  """Names of all families."""
  return [family.name for family in FAMILIES]
