"""Prompts, prefixes and output tokens where the comparison with the reference does not look."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from losa_scenic.adapt_lib import methods, tokens
from losa_scenic.adapt_lib.method import partition, split_head
from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import attention, presets
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.sites import Ctx

CTX = Ctx(grid=(1, 2, 2), prefix=1)
D = 6


def sequence(n=5, seed=0):
  return np.random.default_rng(seed).standard_normal((2, n, D)).astype(np.float32)


def lengths_at(method, options, site, **changes):
  """How many tokens leave that site of each layer, and how many leave the encoder."""
  spec = presets.preset('test/8', **changes)
  model = Adapted(spec, methods.build(method, spec, options), 5)
  collecting = model.clone(
    method=model.method.__class__(
      **{
        **{f: getattr(model.method, f) for f in model.method.__dataclass_fields__},
        'collect': (site,),
      }
    )
  )

  def encode(images):
    return collecting.init_with_output(
      jax.random.key(0), images, method=lambda m, x: m.backbone.encode(x)
    )[0]

  encoded = jax.eval_shape(encode, jnp.zeros(model.input_shape()))
  return [x.shape[1] for x in encoded.layers[site]], encoded.tokens.shape[1]


@pytest.mark.parametrize(
  ('method', 'options', 'in_layers', 'at_end'),
  [
    ('vpt_shallow', {'prompts': 3}, [20, 20, 20], 17),
    ('vpt_deep', {'prompts': 3}, [20, 20, 20], 17),
    ('prompt_accumulate', {'prompts': 3}, [20, 23, 26], 26),
    ('prompt_accumulate', {'prompts': 3, 'layers': 2}, [20, 23, 23], 23),
    ('prompt_accumulate', {'prompts': 3, 'map_sees_prompts': False}, [20, 23, 26], 17),
    ('express', {'prompts': 3}, [20, 20, 20], 20),
    ('prefix', {'length': 3}, [17, 17, 17], 17),
    ('res_tuning', {'length': 3}, [20, 20, 20], 17),
    ('noah', {'prompts': '0,2,4'}, [17, 19, 21], 17),
    ('noah', {'prompts': '4,0,2'}, [21, 21, 19], 17),
    ('noah', {'prompts': '0'}, [17, 17, 17], 17),
  ],
)
def test_length_of_the_sequence_in_every_layer(method, options, in_layers, at_end):
  assert lengths_at(method, options, 'mlp') == (in_layers, at_end)


@pytest.mark.parametrize('replace', [False, True])
@pytest.mark.parametrize('stay', [False, True])
def test_prompts_go_to_the_end_and_stay_or_not(stay, replace):
  x, p = sequence(7), sequence(3)[0]
  module = tokens.Prompts(3, nn.initializers.zeros, stay=stay, replace=replace)
  have = module.apply({'params': {'prompts': p}}, lambda u: 2 * u, x, CTX)
  own = x[:, :5] if replace else x
  want = np.concatenate([own, np.broadcast_to(p, (2, 3, D))], axis=1) if stay else own
  np.testing.assert_array_equal(have, 2 * want)


def test_dropout_of_prompts_is_drawn_for_every_image_and_only_in_training():
  x, rngs = sequence(), {'dropout': jax.random.key(0)}
  module = tokens.Prompts(40, nn.initializers.ones, dropout=0.25, stay=True)
  given = {'params': {'prompts': np.ones((40, D), np.float32)}}
  quiet = module.apply(given, lambda u: u, x, CTX)
  assert np.all(quiet[:, 5:] == 1)
  noisy = module.apply(given, lambda u: u, x, Ctx(grid=(1, 2, 2), prefix=1, train=True), rngs=rngs)
  np.testing.assert_array_equal(noisy[:, :5], x)
  assert set(np.unique(noisy[:, 5:])) == {0, np.float32(1 / 0.75)}
  assert abs(noisy[:, 5:].mean() - 1) < 0.15
  assert np.any(noisy[0, 5:] != noisy[1, 5:])


@pytest.mark.parametrize('rows', [1, 5])
def test_a_prefix_is_seen_where_a_mask_hides_other_keys(rows):
  x, keys, values = sequence(), sequence(2, 1)[0], sequence(2, 2)[0]
  mask = np.random.default_rng(3).random((2, 1, rows, 5)) < 0.5
  mask[..., 0] = True
  module = tokens.Prefix(2, nn.initializers.zeros)
  attend = lambda qkv: attention.attention(*qkv[:3], 2, *qkv[3:])  # noqa: E731
  have = module.apply({'params': {'keys': keys, 'values': values}}, attend, (x, x, x, mask), CTX)
  extended = [np.concatenate([x, np.broadcast_to(p, (2, 2, D))], axis=1) for p in (keys, values)]
  want = np.zeros_like(x)
  for b in range(2):
    for i in range(5):
      seen = np.append(mask[b, 0, i % rows], [True, True])
      for head in (slice(0, 3), slice(3, 6)):
        k, v = (e[b][seen][:, head] for e in extended)
        weights = np.exp(k @ x[b, i, head] / math.sqrt(3))
        want[b, i, head] = weights @ v / weights.sum()
  np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-6)


def bounds(method, options=None, **changes):
  """Largest absolute value of every initial parameter of a method on test/8, d = 32."""
  spec = presets.preset('test/8', **changes)
  model = Adapted(spec, methods.build(method, spec, options), 5)
  values = split_head(model.init_trainable(jax.random.key(0)))[0]
  return {path: float(np.abs(leaf).max()) for path, leaf in trees.flatten(values).items()}


@pytest.mark.parametrize(
  ('method', 'options'),
  [('vpt_shallow', {}), ('vpt_deep', {}), ('prompt_accumulate', {}), ('express', {'prompts': 50})],
)
def test_prompts_start_uniform_as_a_patch_embedding_would(method, options):
  v = math.sqrt(6 / (3 * 8 * 8 + 32))
  prompts = {k: b for k, b in bounds(method, options).items() if k.endswith('/prompts')}
  assert prompts and all(0.95 * v < b <= v for b in prompts.values())


def test_prefix_starts_as_asked():
  v = math.sqrt(6 / (32 * 11))
  assert all(0.95 * v < b <= v for b in bounds('prefix').values())
  assert all(2 < b < 5.5 for b in bounds('prefix', {'init': 'normal'}).values())


def test_residuals_of_express_start_at_zero_and_stand_where_asked():
  start = bounds('express', {'places': 'qkv,out'})
  residuals = {path.split('/')[-2]: b for path, b in start.items() if path.endswith('residuals')}
  assert residuals == dict.fromkeys(
    ('insert_query', 'insert_key', 'insert_value', 'insert_out'), 0.0
  )


def test_adapter_of_res_tuning_does_not_start_at_zero():
  start = {path.split('insert_')[1]: b for path, b in bounds('res_tuning').items()}
  assert start['mlp/delta/up_kernel'] > 0.1 and start['mlp/delta/down_kernel'] > 0.1
  assert start['attend/keys'] > 0.1 and start['block/prompts'] > 0.1


@pytest.mark.parametrize('scan', [False, True])
def test_weights_of_an_unused_map_head_keep_their_place(scan):
  spec = presets.preset('test/8', pool='map')
  model = Adapted(spec, methods.build('express', spec), 5, scan=scan)
  plain = Adapted(spec, methods.build('linear', spec), 5, scan=scan)
  frozen = [trees.describe(partition(m.param_shapes(), m.method)[1]) for m in (model, plain)]
  assert frozen[0] == frozen[1] and any('map_head' in path for path in frozen[0])


@pytest.mark.parametrize('places', ['norm1,out', 'qkv', 'norm1,qkv,out'])
def test_parameter_count_of_express(places):
  spec, sites = presets.preset('B/16'), places.replace('qkv', 'q,k,v').split(',')
  model = Adapted(spec, methods.build('express', spec, {'places': places}), 5, scan=True)
  trainable = split_head(partition(model.param_shapes(), model.method)[0])[0]
  assert trees.count(trainable) == 10 * 768 * (1 + 12 * len(sites))


@pytest.mark.parametrize(
  ('method', 'options', 'message'),
  [
    ('vpt_shallow', {'prompts': 0}, 'vpt_shallow prompts must be at least 1, got 0'),
    ('vpt_deep', {'prompts': -2}, 'vpt_deep prompts must be at least 1, got -2'),
    ('vpt_deep', {'dropout': 1.0}, r'dropout must be in \[0, 1\), got 1.0'),
    ('prompt_accumulate', {'prompts': 0}, 'at least 1, got 0'),
    ('prompt_accumulate', {'layers': 0}, r'layers must be in 1\.\.3, got 0'),
    ('prompt_accumulate', {'layers': 4}, r'layers must be in 1\.\.3, got 4'),
    ('prompt_accumulate', {'layrs': 4}, "Did you mean 'layers'"),
    ('express', {'prompts': 0}, 'at least 1, got 0'),
    ('express', {'places': 'norm1,outs'}, "place 'outs'. Did you mean 'out'"),
    ('express', {'places': 'out,out'}, 'name one twice'),
    ('express', {'places': ''}, "Unknown express place ''"),
    ('prefix', {'length': 0}, 'length must be at least 1, got 0'),
    ('prefix', {'init': 'xavierr'}, "Did you mean 'xavier'"),
    ('res_tuning', {'length': 0}, 'length must be at least 1, got 0'),
    ('res_tuning', {'dropout': -0.1}, r'in \[0, 1\), got -0.1'),
  ],
)
def test_a_bad_option_is_a_user_error(method, options, message):
  with pytest.raises(errors.UserError, match=message):
    methods.build(method, presets.preset('test/8'), options)
