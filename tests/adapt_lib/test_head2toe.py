"""Head2Toe's features, lasso and selection against numpy."""

import json

import jax
import numpy as np
import pytest

from losa_scenic.adapt_lib import head2toe, methods, selection
from losa_scenic.common_lib import errors
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.vit import ViT


def pooled_by_hand(x, target):
  """Tokens [n c] -> a list of features, by the rule of the release."""
  n, c = x.shape
  if c >= target:
    return list(x.mean(axis=0))
  window = max(1, int(n / (target / c)))
  groups = [x[start : start + window].mean(axis=0) for start in range(0, n - window + 1, window)]
  return [value for group in groups for value in group]


def taps_by_hand(spec, params, images, target):
  """For each image, a list of the features of each tap."""
  plain = ViT(spec, {}, head2toe.SITES)
  backbone = {'params': params['backbone']}
  given = plain.apply(backbone, images, method='encode')
  normed = plain.apply(backbone, given.tokens, method='normed')
  pooled = plain.apply(backbone, images)
  tokens = [given.embedded]
  for i in range(spec.depth):
    tokens += [given.layers[site][i] for site in ('norm1', 'attn', 'fc1', 'mlp')]
  tokens.append(normed)
  tokens = [np.asarray(a, np.float64) for a in tokens]
  return [
    [*(pooled_by_hand(a[image], target) for a in tokens), list(np.asarray(pooled[image]))]
    for image in range(len(images))
  ]


def unit(values):
  values = np.asarray(values, np.float64)
  return values / np.sqrt((values**2).sum()) if len(values) else values


@pytest.mark.parametrize('pool', ['cls', 'gap', 'map'])
@pytest.mark.parametrize('target', [16, 40, 100, 512, 4096])
def test_features_equal_the_rule(pool, target, random_like, make_batch):
  spec = presets.preset('test/8', pool=pool)
  model = Adapted(spec, head2toe.build(spec, target_size=target), 5, scan=pool == 'gap')
  unrolled = model.clone(scan=False)
  params, images = random_like(unrolled.param_shapes()), make_batch(2)['inputs']
  have = unrolled.apply({'params': params}, images, method=model.features)
  by_hand = taps_by_hand(spec, params, images, target)
  want = [np.concatenate([unit(tap) for tap in taps]) for taps in by_hand]
  np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5)
  assert head2toe.tap_sizes(spec, target) == tuple(map(len, by_hand[0]))


def test_number_of_features_on_vit_b16():
  # One tap of width 768 more than the two of tokens outside the blocks: the pooled features.
  spec = presets.preset('B/16')
  assert sum(head2toe.tap_sizes(spec, 512)) == 3 * 768 + 12 * (3 * 768 + 3072)
  # Windows of 18 tokens of width 768, of 73 of width 3072.
  assert sum(head2toe.tap_sizes(spec, 8192)) == 2 * 7680 + 12 * (3 * 7680 + 6144) + 768


def test_selected_features_are_normalised_anew_per_tap(tmp_path, random_like, make_batch):
  spec, target = presets.preset('test/8'), 40
  sizes = head2toe.tap_sizes(spec, target)
  ends = np.cumsum(sizes)
  # Of the first tap its first and last feature, nothing of the second, all of the last.
  kept = [0, sizes[0] - 1, ends[1] + 3, *range(ends[-2], ends[-1]), ends[1] + 1]
  path = tmp_path / 'kept.json'
  path.write_text(json.dumps(selection.content(head2toe.identity(spec, target), kept)))
  model = Adapted(spec, head2toe.build(spec, target_size=target, selection=str(path)), 5)
  params, images = random_like(model.param_shapes()), make_batch(2)['inputs']
  have = model.apply({'params': params}, images, method=model.features)
  want = []
  for taps in taps_by_hand(spec, params, images, target):
    first, third = [taps[0][0], taps[0][-1]], [taps[2][1], taps[2][3]]
    want.append(np.concatenate([unit(first), unit(third), unit(taps[-1])]))
  np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5)
  assert params['output_projection']['kernel'].shape == (4 + spec.width, 5)


def test_a_selection_of_bare_indices(tmp_path):
  spec, path = presets.preset('test/8'), tmp_path / 'kept.npy'
  np.save(path, np.array([7, 3, 5]))
  assert head2toe.build(spec, selection=str(path)).side().kept == (3, 5, 7)


def test_a_changed_selection_is_another_method_to_a_checkpoint(tmp_path):
  spec, path, files = presets.preset('test/8'), tmp_path / 'kept.npy', []
  for kept in ([3, 5, 7], [3, 5, 8], [3, 5, 7]):
    np.save(path, np.asarray(kept))
    files.append(head2toe.build(spec, selection=str(path)).files)
  assert files[0] == files[2] != files[1]
  assert head2toe.build(spec).files == ''


def test_group_lasso_is_the_sum_of_row_norms_with_a_gradient_at_zero():
  w = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
  tree = {'output_projection': {'kernel': w, 'bias': np.ones(4, np.float32)}}
  have = head2toe.sum_of_row_norms(tree, weight=0.3)
  np.testing.assert_allclose(have, 0.3 * np.sqrt((w.astype(np.float64) ** 2).sum(1)).sum(), 1e-5)
  gradient = jax.grad(head2toe.sum_of_row_norms)(tree)['output_projection']
  np.testing.assert_allclose(gradient['kernel'], w / np.linalg.norm(w, axis=1)[:, None], rtol=1e-5)
  assert not np.any(gradient['bias'])
  zero = {'output_projection': {'kernel': np.zeros((6, 4), np.float32)}}
  at_zero = jax.grad(head2toe.sum_of_row_norms)(zero)['output_projection']['kernel']
  assert np.array_equal(at_zero, np.zeros((6, 4)))


def test_lasso_is_on_in_the_first_stage_and_off_in_the_second(tmp_path):
  spec, path = presets.preset('test/8'), tmp_path / 'kept.npy'
  np.save(path, np.arange(3))
  tree = {'output_projection': {'kernel': np.ones((2, 4), np.float32)}}
  assert head2toe.build(spec).penalty(tree) == pytest.approx(1e-4 * 2 * 2)
  assert head2toe.build(spec, group_lasso=0.5).penalty(tree) == pytest.approx(0.5 * 2 * 2)
  assert head2toe.build(spec, group_lasso=0.0).penalty is None
  assert head2toe.build(spec, selection=str(path)).penalty is None
  again = head2toe.build(spec, selection=str(path), group_lasso=0.5)
  assert again.penalty(tree) == pytest.approx(2.0)


def _file(tmp_path, content):
  path = tmp_path / 'kept.json'
  path.write_text(content if isinstance(content, str) else json.dumps(content))
  return str(path)


SPEC = presets.preset('test/8')
OURS = head2toe.identity(SPEC, 512)
OTHER = head2toe.identity(presets.preset('test/8', pool='gap', width=64), 512)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('{', 'Cannot read the selection'),
    ('[1, 2]', 'is no selection of version 1'),
    ({'format_version': 2, 'kept': [1]}, 'is no selection of version 1'),
    ({'format_version': 1, 'kept': [1]}, 'is of other features'),
    (
      selection.content(OTHER, [1]),
      r'backbone\.pool gap there, cls here; backbone\.width 64 there, 32 here',
    ),
    (selection.content(head2toe.identity(SPEC, 16), [1]), 'target_size 16 there, 512 here'),
    (selection.content(OURS, []), 'is no list of indices'),
    (selection.content(OURS, [0]) | {'kept': [0.5]}, 'is no list of indices'),
    (selection.content(OURS, [0]) | {'kept': [[0], [1, 2]]}, 'Cannot read the selection'),
    (selection.content(OURS, [-1, 2]), 'different indices in 0..'),
    (selection.content(OURS, [10**6]), 'different indices in 0..'),
    (selection.content(OURS, [4, 4]), 'different indices in 0..'),
  ],
)
def test_a_selection_that_does_not_fit_is_refused(content, message, tmp_path):
  with pytest.raises(errors.UserError, match=message):
    head2toe.build(SPEC, selection=_file(tmp_path, content))


def test_a_damaged_or_missing_selection_is_refused(tmp_path):
  path = tmp_path / 'kept.npy'
  with pytest.raises(errors.UserError, match='There is no selection'):
    head2toe.build(SPEC, selection=str(path))
  for content in (b'', b'no array'):
    path.write_bytes(content)
    with pytest.raises(errors.UserError, match='Cannot read the selection'):
      head2toe.build(SPEC, selection=str(path))
  with pytest.raises(errors.UserError, match='Cannot read the selection'):
    head2toe.build(SPEC, selection=str(tmp_path))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'target_size': 0}, 'target_size must be at least 1, got 0'),
    ({'group_lasso': -1e-5}, 'group_lasso must be at least 0, got -1e-05'),
    ({'group_laso': 1.0}, "Did you mean 'group_lasso'"),
  ],
)
def test_a_bad_option_is_a_user_error(options, message):
  with pytest.raises(errors.UserError, match=message):
    methods.build('head2toe', SPEC, options)
