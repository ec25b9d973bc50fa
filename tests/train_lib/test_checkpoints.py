"""Checkpoints come back bit for bit, or not at all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from losa_scenic.common_lib import errors
from losa_scenic.train_lib import checkpoints
from losa_scenic.train_lib.state import TrainState

IDENTITY = {'backbone': {'sha256': 'abc', 'spec': {'mean': (0.5, 0.5)}}, 'method': {'losa': {}}}


def state(step: int, seed: int = 0, width: int = 64) -> TrainState:
  rng = np.random.default_rng(seed + step)
  trainable = {
    'a': {'kernel': jnp.asarray(rng.standard_normal((width, 64)), jnp.float32)},
    'b': jnp.asarray(rng.standard_normal(3), jnp.float32),
  }
  made = TrainState.create(trainable, optax.adamw(0.1), jax.random.key(seed))
  opt_state = jax.tree.map(
    lambda a: jnp.asarray(rng.standard_normal(a.shape), jnp.float32) if a.ndim else a + step,
    made.opt_state,
  )
  return made.replace(global_step=jnp.int32(step), opt_state=opt_state)


def assert_same(one: TrainState, other: TrainState) -> None:
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def opened(path, identity=IDENTITY, **options) -> checkpoints.Checkpoints:
  return checkpoints.Checkpoints(path, identity, **options)


def save(path, *steps: int) -> None:
  saver = opened(path)
  for step in steps:
    saver.save(state(step))
  saver.close()


def test_the_newest_comes_back_bit_for_bit(tmp_path):
  save(tmp_path, 3, 7)
  saver = opened(tmp_path)
  assert saver.latest_step() == 7
  assert_same(saver.restore(state(0, seed=9)), state(7))
  saver.close()


def test_only_the_last_few_are_kept(tmp_path):
  save(tmp_path, 1, 2, 3, 4)
  folders = (tmp_path / 'checkpoints' / 'last').iterdir()
  assert sorted(folder.name for folder in folders) == ['3', '4']


def test_a_flipped_bit_never_goes_unnoticed(tmp_path):
  save(tmp_path, 7)
  files = (tmp_path / 'checkpoints' / 'last' / '7').rglob('d/*')
  file = max(files, key=lambda f: f.stat().st_size)
  content = file.read_bytes()
  refused = 0
  for position in np.random.default_rng(0).integers(0, len(content), 12):
    flipped = bytearray(content)
    flipped[position] ^= 4
    file.write_bytes(flipped)
    saver = opened(tmp_path)
    try:
      assert_same(saver.restore(state(0)), state(7))  # A byte that nobody reads.
    except errors.UserError as e:
      assert 'is damaged' in str(e)
      refused += 1
    saver.close()
  assert refused >= 6


@pytest.mark.parametrize(
  'identity,parts',
  [
    (IDENTITY | {'backbone': {'sha256': 'xyz', 'spec': {'mean': (0.5, 0.5)}}}, 'backbone.*sha256'),
    (IDENTITY | {'method': {'losa': {'rank': 4}}}, 'method.*rank'),
    (IDENTITY | {'data': {'num_classes': 3}}, 'data.*num_classes'),
  ],
)
def test_another_identity_is_refused(tmp_path, identity, parts):
  save(tmp_path, 7)
  saver = opened(tmp_path, identity)
  with pytest.raises(errors.UserError, match=f'(?s)another {parts}'):
    saver.restore(state(0))
  saver.close()


def test_other_shapes_and_types_are_refused(tmp_path):
  save(tmp_path, 7)
  saver = opened(tmp_path)
  with pytest.raises(errors.UserError, match=r'(?s)other leaves.*a/kernel'):
    saver.restore(state(0, width=32))
  like = state(0)
  half = like.replace(trainable=jax.tree.map(lambda a: a.astype(jnp.bfloat16), like.trainable))
  with pytest.raises(errors.UserError, match=r'(?s)other leaves.*float32'):
    saver.restore(half)
  saver.close()


def test_the_best_is_replaced_only_by_a_better_one(tmp_path):
  saver = opened(tmp_path)
  saver.save(state(1))
  for step, metric in ((1, 0.5), (2, 0.7), (3, 0.7), (4, 0.6)):
    saver.save_best(state(step), metric)
  assert saver.best_metric() == 0.7
  saver.close()
  assert [folder.name for folder in (tmp_path / 'checkpoints' / 'best').iterdir()] == ['2']


@pytest.mark.parametrize('last', [None, 2])
def test_a_best_of_steps_that_will_run_again_is_forgotten(tmp_path, last):
  saver = opened(tmp_path)
  if last:
    saver.save(state(last))
  saver.save_best(state(3), 0.9)
  saver.close()
  saver = opened(tmp_path)
  if last:
    saver.restore(state(0))
  assert saver.best_metric() is None
  saver.close()
