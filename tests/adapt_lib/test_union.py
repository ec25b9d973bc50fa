"""Several methods at once: what their union holds, computes and refuses."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from losa_scenic.adapt_lib import inserts, methods
from losa_scenic.adapt_lib.method import Method, combine, nothing, partition
from losa_scenic.adapt_lib.union import union
from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import encoder, presets, sites
from losa_scenic.model_lib.adapted import Adapted

SPEC = presets.preset('test/8')


class Affine(nn.Module):
  """f(x) * scale + shift, whose order matters when two of them stand at one site."""

  scale: float
  shift: float

  @nn.compact
  def __call__(self, f, x, ctx):
    unused = self.param('unused', nn.initializers.zeros, ())
    return f(x) * self.scale + self.shift + unused


double, increment = functools.partial(Affine, 2.0, 0.0), functools.partial(Affine, 1.0, 1.0)


def features(method, images, seed=0):
  model = Adapted(SPEC, method, 5)
  plain = Adapted(SPEC, Method(), 5).param_shapes()
  rng = np.random.default_rng(seed)
  flat = {p: rng.standard_normal(s.shape).astype('f') for p, s in trees.flatten(plain).items()}
  rest = {p: np.zeros(s.shape, 'f') for p, s in trees.flatten(model.param_shapes()).items()}
  params = trees.unflatten(rest | flat)
  return np.asarray(model.apply({'params': params}, images, method='features'))


def of(module_of_layer_0, module_of_layer_2):
  table = {0: module_of_layer_0, 2: module_of_layer_2}
  return Method(inserts={'fc1': sites.PerLayer(table.get)}, unrolled=True)


def test_the_first_named_stands_closest_to_the_backbone(make_batch):
  images = make_batch(2)['inputs']
  one, two = Method(inserts={'fc1': double}), Method(inserts={'fc1': increment})
  want = features(Method(inserts={'fc1': functools.partial(Affine, 2.0, 1.0)}), images)
  np.testing.assert_allclose(features(union({'a': one, 'b': two}), images), want, rtol=1e-4)
  want = features(Method(inserts={'fc1': functools.partial(Affine, 2.0, 2.0)}), images)
  np.testing.assert_allclose(features(union({'b': two, 'a': one}), images), want, rtol=1e-4)


def test_a_shared_insert_and_one_of_its_sites_also_chain_in_order(make_batch):
  images = make_batch(2)['inputs']
  one, two = Method(inserts={('fc1', 'fc2'): double}), Method(inserts={'fc1': increment})
  both = functools.partial(Affine, 2.0, 1.0)
  want = features(Method(inserts={'fc1': both, 'fc2': double}), images)
  np.testing.assert_allclose(features(union({'a': one, 'b': two}), images), want, rtol=1e-4)


def test_layers_that_differ_chain_layer_by_layer(make_batch):
  images = make_batch(2)['inputs']
  everywhere = Method(inserts={'fc1': increment})
  some = of(double, None)
  have = union({'a': some, 'b': everywhere})
  assert have.unrolled
  both = functools.partial(Affine, 2.0, 1.0)
  table = {0: both, 1: increment, 2: increment}
  want = Method(inserts={'fc1': sites.PerLayer(table.get)}, unrolled=True)
  np.testing.assert_allclose(features(have, images), features(want, images), rtol=1e-4)
  have = union({'a': of(None, double), 'b': of(increment, None)})
  table = {0: increment, 2: double}
  want = Method(inserts={'fc1': sites.PerLayer(table.get)}, unrolled=True)
  np.testing.assert_allclose(features(have, images), features(want, images), rtol=1e-4)


def test_what_trains_is_what_any_part_trains():
  one = Method(trains=lambda path: path.endswith('cls'))
  two = Method(trains=lambda path: path.endswith('norm/scale'), exact_at_init=False)
  both = union({'a': one, 'b': two, 'c': Method(collect=('attn',)), 'd': Method(collect=('mlp',))})
  assert [both.trains(path) for path in ('cls', 'norm/scale', 'norm/bias')] == [True, True, False]
  assert both.collect == ('attn', 'mlp') and not both.exact_at_init
  assert union({'a': Method(), 'b': Method()}).trains is nothing


def test_gradients_enter_where_they_enter_the_deepest_part():
  some = Method(inserts={'fc1': sites.PerLayer({2: double}.get)}, unrolled=True, first=2)
  assert union({'a': some, 'b': Method()}).first == 2
  assert union({'a': some, 'b': Method()}).memory_class == 'B'
  assert union({'a': some, 'b': Method(inserts={'fc2': double})}).first == 0
  assert union({'a': Method(), 'b': Method()}).memory_class == 'A'


@pytest.mark.parametrize(
  ('name', 'options'),
  [
    ('lora+ssf', {}),
    ('vpt_deep+adapter', {'vpt_deep': {'prompts': 3}}),
    ('losa+lora', {'losa': {'rank': 2}, 'lora': {'rank': 2}}),
    ('bitfit+lora', {}),
    ('prefix+adaptformer', {'prefix': {'length': 2}}),
    ('adapter_plus+dtl', {}),
    ('last_k+lora', {'last_k': {'k': 1}}),
  ],
)
def test_a_union_trains_the_parameters_of_its_parts(name, options, random_like, make_batch):
  def count(built):
    model = Adapted(SPEC, built, 5)
    return {
      path: shape
      for path, shape in trees.describe(partition(model.param_shapes(), built)[0]).items()
      if not path.startswith('output_projection')
    }

  model = Adapted(SPEC, methods.build(name, SPEC, options), 5)
  parts = [methods.build(part, SPEC, options.get(part)) for part in methods.parts(name)]
  sizes = lambda table: sorted(map(str, table.values()))  # noqa: E731
  assert sizes(count(model.method)) == sizes(
    {f'{i}{path}': v for i, part in enumerate(parts) for path, v in count(part).items()}
  )
  params = random_like(model.param_shapes())
  logits = model.apply({'params': params}, make_batch(2)['inputs'])
  assert np.isfinite(logits).all() and np.ptp(logits) > 0


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('losa+lst', 'losa and lst each have a side network'),
    ('fact_tk+fact_tt', 'fact_tk and fact_tt each have values shared by all layers'),
    ('noah+vpt_deep', 'noah and vpt_deep each add tokens'),
    ('losa+vpt_deep', "vpt_deep adds tokens.*losa's side network"),
    ('vpt_deep+express', 'vpt_deep and express each add tokens'),
    ('dtl+adapter_plus', "adapter_plus would see dtl's added tokens.*'adapter_plus\\+dtl'"),
    ('lora+lora', "'lora\\+lora' names a part twice"),
    ('lora+sff', "Unknown method 'sff'. Did you mean 'ssf'"),
    ('lora+', "Unknown method ''"),
  ],
)
def test_methods_that_cannot_stand_together(name, message):
  with pytest.raises(errors.UserError, match=message):
    methods.build(name, SPEC)


def test_options_of_several_methods():
  given = methods.from_text('lora+ssf', {'lora.rank': '4', 'ssf.init': 'identity'})
  assert given == {'lora': {'rank': 4}, 'ssf': {'init': 'identity'}}
  assert methods.from_text('lora', {'rank': '4'}) == {'rank': 4}
  with pytest.raises(errors.UserError, match="'rank': say whose option it is"):
    methods.from_text('lora+ssf', {'rank': '4'})
  with pytest.raises(errors.UserError, match="Unknown part of method 'lora\\+ssf' 'losa'"):
    methods.build('lora+ssf', SPEC, {'losa': {'rank': 3}})


def test_inserts_that_cannot_stand_in_the_order_of_the_names():
  one = Method(inserts={('query', 'key'): double})
  two, three = Method(inserts={'query': increment}), Method(inserts={('query', 'key'): increment})
  union({'one': one, 'three': three, 'two': two})
  with pytest.raises(errors.UserError, match='cannot stand in this order'):
    union({'one': one, 'two': two, 'three': three})


@pytest.mark.parametrize('name', ['full+losa', 'full+vpt_shallow', 'lora+full', 'convpass+full'])
def test_dropping_tokens_goes_with_nothing_that_reads_them(name):
  methods.build(name, SPEC, {})
  with pytest.raises(errors.UserError, match='full drops tokens in training'):
    methods.build(name, SPEC, {'full': {'token_keep': 0.5}})
  assert methods.build('full+bitfit', SPEC, {'full': {'token_keep': 0.5}}).drops_tokens


@pytest.mark.parametrize(
  ('name', 'options', 'pool'),
  [
    ('lst+ssf', {}, 'cls'),
    ('hst+ssf', {'hst': {'stages': 3}}, 'cls'),
    ('express+lora', {'lora': {'map_head': True}}, 'map'),
    ('dtl+lora', {'dtl': {'pool': 'mean'}, 'lora': {'map_head': True}}, 'map'),
  ],
)
def test_an_insert_that_the_other_method_leaves_out_is_an_error(name, options, pool):
  spec = presets.preset('test/8', pool=pool)
  model = Adapted(spec, methods.build(name, spec, options), 5)
  with pytest.raises(errors.UserError, match='No pass through the model reaches the inserts at'):
    model.param_shapes()


def test_memory_class_of_a_union_with_trained_kernels():
  assert methods.build('last_k+lora', SPEC, {}).memory_class == 'D'
  assert methods.build('last_k+linear', SPEC, {}).memory_class == 'B'


def test_low_rank_of_a_union_is_found_under_its_own_name():
  method = union({
    'a': Method(inserts={'query': functools.partial(inserts.LowRank, rank=2)}),
    'b': Method(inserts={'query': functools.partial(inserts.LowRank, rank=3)}),
  })  # fmt: skip
  paths = trees.describe(jax.tree.map(lambda s: s, Adapted(SPEC, method, 5).param_shapes()))
  layer = 'backbone/encoder/layers_0/insert_query'
  assert paths[f'{layer}/first/a'][0] == [32, 2] and paths[f'{layer}/second/a'][0] == [32, 3]


def test_inserts_learn_through_what_a_side_network_reads_scanned_as_unrolled(
  random_like, make_batch
):
  spec, images = presets.preset('test/8', depth=6), make_batch(2)['inputs']
  method = methods.build('losa+lora', spec, {'losa': {'rank': 2}, 'lora': {'rank': 2}})
  params = random_like(Adapted(spec, method, 5).param_shapes(), scale=0.3)

  def gradient(scan):
    model = Adapted(spec, method, 5, scan=scan)
    trained, frozen = partition(encoder.stack_layers(params) if scan else params, method)

    def loss(trained):
      logits = model.apply({'params': combine(trained, frozen)}, images, train=True)
      return jax.numpy.sin(logits).sum()

    return jax.jit(jax.grad(loss))(trained)

  want = trees.flatten(encoder.stack_layers(gradient(False)))
  for path, have in trees.flatten(gradient(True)).items():
    np.testing.assert_allclose(have, want[path], rtol=1e-3, atol=1e-4, err_msg=path)
  assert any('insert_query' in path and np.any(leaf) for path, leaf in want.items())
