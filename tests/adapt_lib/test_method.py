"""What a method is: registry, the split of parameters, and token dropout."""

import jax
import numpy as np
import pytest

from losa_scenic.adapt_lib import inserts, methods
from losa_scenic.adapt_lib.method import Method, combine, partition, split_head
from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.sites import Ctx


def params_of(method, **changes):
  spec = presets.preset('test/8', **changes)
  return Adapted(spec, method, 5).param_shapes()


LOW_RANK = {'query': lambda: inserts.LowRank(2), 'norm': lambda: inserts.LowRank(2)}
RULES = [
  Method(),
  Method(inserts=LOW_RANK),
  Method(trains=lambda path: path.endswith('bias')),
  Method(inserts=LOW_RANK, trains=lambda path: path.startswith('norm/')),
  methods.build('full', presets.preset('test/8')),
  methods.build('losa', presets.preset('test/8')),
]


@pytest.mark.parametrize('method', RULES)
def test_combine_is_the_inverse_of_partition_and_the_parts_are_disjoint(method):
  params = params_of(method)
  trainable, frozen = partition(params, method)
  assert not set(trees.flatten(trainable)) & set(trees.flatten(frozen))
  assert trees.describe(combine(trainable, frozen)) == trees.describe(params)


def test_partition_follows_the_rule_and_takes_every_insert_and_the_head():
  method = RULES[3]
  trainable, frozen = partition(params_of(method), method)
  paths = set(trees.flatten(trainable))
  want = {'backbone/norm/bias', 'backbone/norm/scale'}
  want |= {f'output_projection/{leaf}' for leaf in ('kernel', 'bias')}
  want |= {f'backbone/insert_norm/{leaf}' for leaf in 'ab'}
  want |= {f'backbone/encoder/layers_{i}/insert_query/{leaf}' for i in range(3) for leaf in 'ab'}
  assert paths == want
  assert 'backbone/cls' in trees.flatten(frozen)


def test_partition_refuses_to_train_nothing():
  params = {'backbone': {'cls': np.zeros(3)}}
  with pytest.raises(errors.UserError, match='Nothing would train'):
    partition(params, Method())


def test_partition_refuses_a_rule_that_matches_nothing():
  with pytest.raises(errors.UserError, match='matches none'):
    partition(params_of(Method()), Method(trains=lambda path: path == 'no/such/path'))


def test_combine_refuses_a_path_in_both():
  tree = {'a': {'b': np.zeros(2)}}
  with pytest.raises(ValueError, match=r"Both trainable and frozen: \['a/b'\]"):
    combine(tree, tree)


def test_split_head_takes_the_classifier_off():
  trainable = {'side': {'x': 1}, 'output_projection': {'kernel': 2}}
  assert split_head(trainable) == ({'side': {'x': 1}}, {'output_projection': {'kernel': 2}})


@pytest.mark.parametrize(
  ('method', 'spares'),
  [
    (Method(), True),
    (Method(inserts={'pool_key': lambda: None, 'norm': lambda: None}), True),
    (Method(inserts={'fc1': lambda: None}), False),
    (Method(inserts={'encoder': lambda: None}), False),
    (Method(inserts={'patch': lambda: None}), False),
    (Method(trains=lambda path: path.startswith('norm/')), False),
  ],
)
def test_spares_backbone(method, spares):
  assert method.spares_backbone == spares


@pytest.mark.parametrize('field', ['inserts', 'collect'])
def test_a_method_with_an_unknown_site_is_refused(field):
  value = {'fc_1': lambda: None} if field == 'inserts' else ('fc_1',)
  with pytest.raises(errors.UserError, match=r"Unknown (layer )?site 'fc_1'\. Did you mean 'fc1'"):
    Method(**{field: value})


def test_an_unknown_method_names_the_nearest_one():
  with pytest.raises(errors.UserError, match=r"Unknown method 'lossa'\. Did you mean 'losa'"):
    methods.build('lossa', presets.preset('test/8'))


def test_options_at_none_count_as_not_given():
  spec = presets.preset('test/8')
  assert methods.build('losa', spec, {'rank': None}).side().rank == 16


@pytest.mark.parametrize('keep', [0.0, -0.5, 1.5])
def test_token_keep_outside_its_range_is_refused(keep):
  with pytest.raises(errors.UserError, match=r'token_keep must be in \(0, 1\]'):
    methods.build('full', presets.preset('test/8'), {'token_keep': keep})


@pytest.mark.parametrize(('keep', 'kept'), [(0.5, 8), (0.01, 1), (1.0, 16)])
def test_token_dropout_keeps_prefix_and_a_random_share_in_order(keep, kept):
  tokens = np.tile(np.arange(17.0)[None, :, None], (6, 1, 2))
  seen = []

  def f(x):
    seen.append(np.asarray(x[..., 0]))
    return x

  module = inserts.TokenDropout(keep)
  ctx = Ctx(grid=(1, 4, 4), prefix=1, train=True)
  module.apply({}, f, tokens, ctx, rngs={'dropout': jax.random.key(0)})
  rows = seen[0]
  assert rows.shape == (6, 1 + kept) and not rows[:, 0].any()
  assert (np.diff(rows, axis=1) > 0).all(), 'in order, no token twice'
  if kept < 16:
    assert len({tuple(row) for row in rows}) > 1, 'every image its own share'
  module.apply({}, f, tokens, Ctx(grid=(1, 4, 4), prefix=1))
  assert seen[1].shape == (6, 17), 'evaluation uses all tokens'
