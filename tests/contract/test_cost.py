"""Cost of a train step by XLA's count: methods that spare the backbone only run it forward."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import pytest
from reference import kinds

from losa_scenic.adapt_lib import methods
from losa_scenic.bench_lib import cost
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.adapted import Adapted

BATCH = 8


# HST has no more stages than there are layers. A ladder of the default width, 4 channels here, does
# more softmax and GELU than products, and their backward pass is more than twice the forward pass.
# A temporal encoder sees two tokens: the optimizer's step counts beside its products.
OPTIONS = {'hst': {'stages': 3}, 'lst': {'width': 8}, 'temporal': {'depth': 1}}


def tiny(method='losa', pool='cls', scan=False, **options):
  spec = presets.preset('test/8', pool=pool, **kinds.changes(method))
  options = OPTIONS.get(method, {}) | options
  return Adapted(spec, methods.build(method, spec, options), num_classes=5, scan=scan)


def leaking(model):
  """The model with one trained parameter at the very bottom of the backbone."""
  method = dataclasses.replace(model.method, trains=lambda path: path == 'patch/proj/bias')
  return model.clone(method=method)


# Every method that claims it, with its defaults, and variants that train more than those.
SPARING = [
  *((name, 'cls', {}) for name in methods.METHODS if tiny(name).method.spares_backbone),
  ('losa', 'map', {'map_head_lora_rank': 4}),
]


def test_losa_and_linear_claim_to_spare_the_backbone_and_full_does_not():
  assert {name for name, _, _ in SPARING} >= {'linear', 'losa'}
  assert not tiny('full').method.spares_backbone


@pytest.mark.parametrize(('method', 'pool', 'options'), SPARING)
def test_step_runs_the_encoder_forward_only(method, pool, options):
  cost.check_spares_backbone(tiny(method, pool, **options), BATCH)


def test_a_forward_pass_of_vit_s16_costs_what_is_published():
  spec = presets.preset('S/16')
  model = Adapted(spec, methods.build('linear', spec, {}), num_classes=10)
  # 2 x 4.6 G multiply-adds per image (DeiT-S, Touvron et al. 2021, Table 5).
  assert cost.forward_flops(model, 2) == pytest.approx(2 * 2 * 4.6e9, rel=0.02)


def test_losa_on_vit_s16_costs_a_forward_pass_and_three_side_passes(record_property):
  spec = presets.preset('S/16', depth=4)
  model = Adapted(spec, methods.build('losa', spec, {'rank': 16}), num_classes=10)
  costs = cost.check_spares_backbone(model, batch_size=2)
  ratio = (costs['step'] - costs['forward']) / costs['side']
  record_property('training_passes_of_side_network', ratio)
  print({name: f'{value / 1e9:.3f} GFLOP' for name, value in costs.items()}, f'ratio {ratio:.4f}')
  # Of three passes less what nobody asks for: the gradient of y_0, which is frozen.
  assert 2 < ratio < 3.1
  assert costs['step'] / (costs['forward'] + 3 * costs['side']) < 1.005


def test_backpropagation_through_the_encoder_is_noticed_by_operations():
  with pytest.raises(AssertionError, match=r'backpropagates.*forward 0\.0\d+.*step 0\.0\d+'):
    cost.check_operations(leaking(tiny()), BATCH)


def test_backpropagation_through_the_encoder_is_noticed_by_residuals():
  for check in (cost.check_residuals, cost.check_spares_backbone):
    with pytest.raises(AssertionError, match=r'keeps activations.*\((8, 17|17, 8), 64\)'):
      check(leaking(tiny()), BATCH)


@pytest.mark.parametrize('scan', [False, True])
def test_residuals_of_losa_are_those_of_the_side_network(scan):
  model = tiny(scan=scan, rank=4)
  kept = cost.residuals(model, BATCH)
  assert kept == cost.residuals_after_encoder(model, BATCH)
  spec = model.spec
  large = collections.Counter(shape for shape, _ in kept if len(shape) > 2 and BATCH in shape)
  n, d = spec.tokens, spec.width
  assert not [s for s in large if spec.mlp in s or spec.heads in s], 'a hidden activation or scores'
  # Of each of the 3 mixers b and its hidden units, of channels or of tokens; y before each group;
  # and of the class token, the only one that is read, what the final norm needs.
  if scan:  # A loop over one pair, and the last mixer by itself, with its b once more.
    whole = {s: count for s, count in large.items() if n in s and d in s}
    assert set(whole) == {(3, BATCH, n, d), (1, n, BATCH, d), (n, BATCH, d)}
    assert large[3, BATCH, n, d] == large[1, n, BATCH, d] == 1 and large[n, BATCH, d] <= 2
    assert large[1, n, BATCH, 4] == large[n, BATCH, 4] == large[1, 4, BATCH, d] == 1
    return
  whole = {s: count for s, count in large.items() if n in s and d in s}
  assert set(whole) <= {(BATCH, n, d), (n, BATCH, d)} and sum(whole.values()) <= 4
  assert large[n, BATCH, 4] == 2 and large[4, BATCH, d] == 1


@pytest.mark.parametrize('execution', [{'dtype': jnp.bfloat16}, {'scan': True, 'remat': True}])
def test_losa_spares_the_backbone_however_it_is_executed(execution):
  model = tiny().clone(**execution)
  cost.check_residuals(model, BATCH)
  with pytest.raises(AssertionError, match='keeps activations'):
    cost.check_residuals(leaking(model), BATCH)


@pytest.mark.parametrize('k', [1, 2])
def test_tuning_the_last_layers_keeps_nothing_of_those_below(k):
  def kept(depth):
    spec = presets.preset('test/8', depth=depth)
    method = methods.build('last_k', spec, {'k': k})
    assert (method.memory_class, method.first) == ('B', depth - k)
    return cost.residuals(Adapted(spec, method, 5), BATCH)

  assert kept(3) == kept(6)
  # On CPUs tokens stand first.
  hidden = [shape for shape, _ in kept(6) if shape in ((BATCH, 17, 64), (17, BATCH, 64))]
  assert hidden and len(hidden) % k == 0


@pytest.mark.parametrize(
  ('name', 'want'),
  [
    *((name, 'A') for name in ('losa', 'linear', 'lst', 'last', 'res_tuning_bypass', 'head2toe')),
    ('temporal', 'A'),
    *((name, 'B') for name in ('last_k', 'dtl')),
    *((name, 'D') for name in ('full', 'mlp_only', 'attention_only')),
    *((name, 'C') for name in ('bitfit', 'lora', 'adapter', 'vpt_shallow', 'toast', 'hst', 'ssf')),
  ],
)
def test_memory_classes(name, want):
  assert tiny(name).method.memory_class == want


def test_full_fine_tuning_keeps_the_activations_of_every_block():
  kept = collections.Counter(cost.residuals(tiny('full'), BATCH))
  hidden = kept[((17, BATCH, 64), 'float32')] + kept[((BATCH, 17, 64), 'float32')]
  assert hidden >= 3, 'the hidden activations of the three MLPs'


def test_flops_of_a_matrix_product():
  a, b = (jax.ShapeDtypeStruct(shape, 'float32') for shape in ((8, 16), (16, 4)))
  assert cost.flops(lambda x, y: x @ y, a, b) == pytest.approx(2 * 8 * 16 * 4, rel=0.1)


def test_scan_is_unrolled_before_counting():
  assert cost.side_forward_flops(tiny('linear', scan=True), 2) > 0
