"""NOAH: options, published architectures, and the supernet against the networks it contains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from losa_scenic.adapt_lib import methods, noah_supernet
from losa_scenic.adapt_lib.method import combine, partition, split_head
from losa_scenic.adapt_lib.noah_architectures import ARCHITECTURES
from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import encoder, presets
from losa_scenic.model_lib.adapted import Adapted

# Trainable parameters by the paper's formula, added up by hand for d = 768.
PUBLISHED = {
  'cifar': 320330,
  'caltech101': 426313,
  'dtd': 287298,
  'oxford_flowers102': 386367,
  'oxford_iiit_pet': 365622,
  'svhn': 431686,
  'sun397': 287278,
  'patch_camelyon': 330290,
  'eurosat': 397907,
  'resisc45': 365621,
  'diabetic_retinopathy': 382533,
  'clevr_count': 382543,
  'clevr_dist': 353332,
  'dmlab': 392511,
  'kitti': 397888,
  'dsprites_loc': 334914,
  'dsprites_ori': 387151,
  'smallnorb_azi': 291877,
  'smallnorb_ele': 321090,
}
NAMES = noah_supernet.MODULES
# What a search may come to, and what only a person would ask for.
CHOICES = [
  ((10, 10, 10), (10, 10, 10), (10, 10, 10)),
  ((5, 1, 0), (1, 0, 0), (10, 5, 1)),
  ((1, 0, 0), (5, 10, 1), (1, 0, 0)),
  ((10, 0, 5), (0, 1, 5), (0, 10, 0)),
  ((0, 0, 10), (10, 0, 0), (5, 5, 0)),
]


def adapted(options, pool='cls', **execution):
  spec = presets.preset('test/8', pool=pool)
  return Adapted(spec, methods.build('noah', spec, options), 5, **execution)


def count(spec, options):
  model = Adapted(spec, methods.build('noah', spec, options), 5)
  return trees.count(split_head(partition(model.param_shapes(), model.method)[0])[0])


def test_every_published_architecture_is_there():
  assert set(ARCHITECTURES) == set(PUBLISHED)


@pytest.mark.parametrize('task', sorted(PUBLISHED))
def test_parameter_count_of_the_published_architectures(task):
  method = methods.build('noah', presets.preset('B/16'), {'architecture': task})
  d, total = 768, 0
  for i in range(12):  # Read back from what is built, without tracing 19 deep models.
    made = {site: insert.make(i)() for site, insert in method.inserts.items() if site != 'encoder'}
    hidden = made['mlp'].make().hidden
    total += made['block'].count * d + 4 * d * made['query', 'key', 'value'].rank
    total += 2 * d * hidden + hidden + d
  assert total == PUBLISHED[task]


@pytest.mark.parametrize(
  ('options', 'want'),
  [
    ({}, 3 * (5 * 32 + 4 * 32 * 5 + 2 * 32 * 5 + 5 + 32)),
    ({'prompts': '2', 'rank': '0', 'bottleneck': '0'}, 3 * 2 * 32),
    ({'prompts': '3,0,1', 'rank': '0,2,0', 'bottleneck': '0'}, 4 * 32 + 8 * 32),
    ({'prompts': '0', 'rank': '0', 'bottleneck': '0,4,0'}, 8 * 32 + 4 + 32),
    ({'supernet': True}, 3 * (70 * 32 + 10 + 32)),
  ],
)
def test_parameter_count(options, want):
  assert count(presets.preset('test/8'), options) == want


def test_a_module_of_width_zero_is_absent():
  shapes = adapted({'prompts': '0,2,0', 'rank': '1,0,0', 'bottleneck': '0,0,4'}).param_shapes()
  layers = shapes['backbone']['encoder']
  inserts = [{k for k in layers[f'layers_{i}'] if k.startswith('insert_')} for i in range(3)]
  assert inserts == [{'insert_query+key+value'}, {'insert_block'}, {'insert_mlp'}]


@pytest.mark.parametrize(('prompts', 'exact'), [('0', True), ('0,1,0', False)])
def test_without_prompts_it_starts_as_the_frozen_model(prompts, exact):
  method = adapted({'prompts': prompts}).method
  assert method.exact_at_init == exact
  assert method.adds_tokens == (not exact)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'prompts': '1,2'}, r"prompts must be 3 integers .* got '1,2'"),
    ({'rank': '1,2,3,4'}, 'rank must be 3 integers'),
    ({'bottleneck': '-1'}, "bottleneck must be .* got '-1'"),
    ({'rank': '1,,2'}, "got '1,,2'"),
    ({'rank': ''}, "got ''"),
    ({'prompts': '0', 'rank': '0', 'bottleneck': '0,0,0'}, 'all widths are 0'),
    ({'architecture': 'cifar'}, 'architecture needs 12 blocks, not 3'),
    ({'architecture': 'cifa'}, "Did you mean 'cifar'"),
    ({'dropout': 1.5}, r'in \[0, 1\), got 1.5'),
    ({'supernet': True, 'rank': '1'}, 'supernet and rank exclude each other'),
  ],
)
def test_a_bad_option_is_a_user_error(options, message):
  with pytest.raises(errors.UserError, match=message):
    methods.build('noah', presets.preset('test/8'), options)


def test_an_architecture_excludes_widths():
  with pytest.raises(errors.UserError, match='architecture and prompts exclude each other'):
    methods.build('noah', presets.preset('B/16'), {'architecture': 'cifar', 'prompts': '3'})


def sliced(super_params, model):
  """The weights of a network with smaller widths, cut out of the supernet's."""
  flat = trees.flatten(encoder.unstack_layers(super_params))
  return trees.unflatten(
    {
      path: flat[path.replace('/delta/', '/')][tuple(slice(size) for size in shape.shape)]
      for path, shape in trees.flatten(model.param_shapes()).items()
    }
  )


@pytest.mark.parametrize('choice', CHOICES, ids=str)
@pytest.mark.parametrize('pool', ['cls', pytest.param('map', marks=pytest.mark.slow)])
def test_supernet_equals_the_network_that_is_cut_out_of_it(choice, pool, random_like, make_batch):
  options = {k: ','.join(map(str, row)) for k, row in zip(NAMES, choice, strict=True)}
  small, images = adapted(options, pool), make_batch(2)['inputs']
  largest = adapted({'supernet': True}, pool, scan=True)
  params = random_like(largest.param_shapes())
  want = small.apply({'params': sliced(params, small)}, images, method='features')
  widths = {'architecture': {'side': {'widths': jnp.asarray(choice)}}}
  have = largest.apply({'params': params, **widths}, images, method='features')
  np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)
  all_of_it = largest.apply({'params': params}, images, method='features')
  assert (np.abs(all_of_it - want).max() > 0.01) == (choice != CHOICES[0])


def test_supernet_trains_only_what_the_choice_has(random_like, make_batch):
  model, images = adapted({'supernet': True}, scan=False), make_batch(2)['inputs']
  trainable, frozen = random_like(partition(model.param_shapes(), model.method))
  widths = {'architecture': {'side': {'widths': jnp.asarray(CHOICES[1])}}}

  def loss(trainable):
    params = combine(trainable, frozen)
    return (model.apply({'params': params, **widths}, images, method='features') ** 3).sum()

  grads = jax.grad(loss)(trainable)['backbone']['encoder']
  used = lambda i, site, name: np.abs(grads[f'layers_{i}'][site][name]) > 0  # noqa: E731
  prompts = [used(i, 'insert_block', 'prompts').all(axis=1).sum() for i in range(3)]
  assert prompts == [5, 1, 0]
  assert [used(i, 'insert_query+key+value', 'b_query').any(axis=1).sum() for i in range(3)] == [
    1,
    0,
    0,
  ]
  kernels = [np.asarray(grads[f'layers_{i}']['insert_mlp']['up_kernel']) for i in range(3)]
  assert [(np.abs(g) > 0).all(axis=1).sum() for g in kernels] == [10, 5, 1]


def test_training_draws_another_choice_with_every_key_and_evaluation_does_not(
  random_like, make_batch
):
  model, images = adapted({'supernet': True}, scan=True), make_batch(2)['inputs']
  params = {'params': random_like(model.param_shapes())}
  forward = jax.jit(
    lambda key: model.apply(params, images, train=True, rngs={'dropout': key}, method='features')
  )
  first, again, other = (np.asarray(forward(jax.random.key(i))) for i in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 0.01


def test_choices_are_uniform_over_depths_and_widths():
  draws = jax.vmap(lambda key: noah_supernet.draw(key, 4))(jax.random.split(jax.random.key(0), 900))
  draws = np.asarray(draws)
  assert draws.shape == (900, 3, 4) and set(np.unique(draws)) == {0, 1, 5, 10}
  depth = (draws > 0).sum(axis=2)
  assert np.all(np.diff(draws > 0, axis=2).astype(int).sum(axis=2) <= 1), 'zeros come last'
  shares = [(depth == k).mean() for k in (1, 2, 3, 4)]
  assert np.allclose(shares, 0.25, atol=0.04)
  assert np.allclose([(draws[draws > 0] == k).mean() for k in (1, 5, 10)], 1 / 3, atol=0.04)
  assert abs(np.corrcoef(depth[:, 0], depth[:, 1])[0, 1]) < 0.15, 'modules are independent'


@pytest.mark.parametrize(
  ('depth', 'want'),
  [(12, (3, 6, 9, 12)), (6, (2, 3, 4, 6)), (3, (1, 2, 3)), (1, (1,)), (40, (10, 20, 30, 40))],
)
def test_depths(depth, want):
  assert noah_supernet.depths(depth) == want
