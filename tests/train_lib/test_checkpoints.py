"""Checkpoints come back bit for bit, or not at all."""

import json
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from reference.run_states import IDENTITY, assert_same, names, opened, save, state

from losa_scenic.common_lib import errors
from losa_scenic.train_lib import checkpoint_files, checkpoint_state, checkpoints, sharding
from losa_scenic.train_lib.state import TrainState


def test_the_newest_comes_back_bit_for_bit(tmp_path):
  save(tmp_path, 3, 7)
  saver = opened(tmp_path)
  assert saver.latest_step() == 7
  restored, notes = saver.restore(state(0, seed=9))
  assert_same(restored, state(7))
  assert notes == {'sums': [0.1, 7]}
  saver.close()


def test_numbers_of_ten_or_more_leaves_keep_their_order(tmp_path):
  # By name, 10 comes before 2.
  like = state(0)
  like = like.replace(opt_state=[jnp.zeros(()) for _ in range(23)])
  saver = opened(tmp_path)
  saved = like.replace(opt_state=[jnp.float32(i) for i in range(23)], global_step=jnp.int32(1))
  saver.save(saved)
  saver.close()
  assert_same(opened(tmp_path).restore(like)[0], saved)


def test_the_files_can_be_read_without_this_package(tmp_path):
  save(tmp_path, 7)
  folder = tmp_path / 'checkpoints' / 'last' / '7'
  assert sorted(f.name for f in folder.iterdir()) == [
    'manifest.json',
    'meta.json',
    'state.safetensors',
  ]
  arrays = safetensors.numpy.load_file(folder / 'state.safetensors')
  np.testing.assert_array_equal(arrays['trainable/a/kernel'], state(7).trainable['a']['kernel'])
  meta = json.loads((folder / 'meta.json').read_text())
  assert meta['format_version'] == 3
  assert meta['step'] == meta['data_position'] == 7
  assert meta['leaves']['trainable/half'] == [[2, 5], 'bfloat16']
  assert meta['identity'] == json.loads(json.dumps(IDENTITY))


def test_only_the_last_few_are_kept(tmp_path):
  save(tmp_path, 1, 2, 3, 4)
  assert names(tmp_path) == ['3', '4']
  saver = opened(tmp_path, keep=3)
  saver.save(state(10))
  saver.close()
  assert names(tmp_path) == ['10', '3', '4']


def test_a_step_is_saved_once(tmp_path):
  save(tmp_path, 4)
  files = {f: f.stat().st_mtime_ns for f in tmp_path.rglob('*') if f.is_file()}
  saver = opened(tmp_path)
  for _ in range(2):
    saver.save(state(4, seed=5))
  saver.close()
  assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob('*') if f.is_file()} == files


@pytest.mark.parametrize('devices', [1, 2])
def test_a_step_that_reuses_the_buffers_changes_nothing(tmp_path, devices):
  mesh = jax.sharding.Mesh(jax.devices()[:devices], ('data',))
  step = jax.jit(lambda s: jax.tree.map(lambda a: (a * 3 + 1).astype(a.dtype), s), donate_argnums=0)
  assert all(array.flags.owndata for array in checkpoint_state.to_host(state(1)).values())
  saver = opened(tmp_path, keep=20)
  now = sharding.replicate(state(1), mesh)
  expected = {}
  for number in range(1, 9):
    now = now.replace(global_step=sharding.replicate(jnp.int32(number), mesh))
    expected[number] = jax.tree.map(lambda a: np.array(a), now)
    saver.save(now)
    now = step(now)
  saver.close()
  for number in range(8, 0, -1):
    assert_same(opened(tmp_path).restore(state(0))[0], expected[number])
    shutil.rmtree(tmp_path / 'checkpoints' / 'last' / str(number))


@pytest.mark.parametrize('here,there', [(1, 2), (2, 1)])
def test_it_comes_back_on_another_number_of_devices(tmp_path, here, there):
  def placed(made: TrainState, number: int) -> TrainState:
    return sharding.replicate(made, jax.sharding.Mesh(jax.devices()[:number], ('data',)))

  saver = opened(tmp_path)
  saver.save(placed(state(5), here))
  saver.close()
  like = placed(state(0), there)
  restored, _ = opened(tmp_path).restore(like)
  assert_same(restored, state(5))
  for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
    assert a.sharding == b.sharding and len(a.devices()) == there


@pytest.mark.parametrize(
  'identity,parts',
  [
    (IDENTITY | {'backbone': {'sha256': 'xyz', 'spec': {'mean': (0.5, 0.5)}}}, 'backbone.*sha256'),
    (IDENTITY | {'backbone': {'sha256': 'abc', 'spec': {'mean': (0.5, 0.4)}}}, 'backbone.*mean'),
    (IDENTITY | {'method': {'losa': {'rank': 4}}}, 'method.*rank'),
    (IDENTITY | {'data': {'num_classes': 3}}, 'data.*num_classes'),
  ],
)
def test_another_identity_is_refused(tmp_path, identity, parts):
  save(tmp_path, 6, 7)
  with pytest.raises(errors.UserError, match=f'(?s)/7 belongs to another {parts}'):
    opened(tmp_path, identity).restore(state(0))
  assert names(tmp_path) == ['6', '7']


def test_other_shapes_and_types_are_refused_naming_all(tmp_path):
  save(tmp_path, 6, 7)
  with pytest.raises(errors.UserError, match=r'(?s)/7 has other leaves.*a/kernel.*32, 64'):
    opened(tmp_path).restore(state(0, width=32))
  like = state(0)
  half = like.replace(trainable=jax.tree.map(lambda a: a.astype(jnp.float16), like.trainable))
  with pytest.raises(errors.UserError, match=r'other leaves') as raised:
    opened(tmp_path).restore(half)
  assert all(f'trainable/{name}' in str(raised.value) for name in ('a/kernel', 'b', 'half'))
  more = like.replace(trainable=like.trainable | {f'more{i}': jnp.zeros(1) for i in range(30)})
  with pytest.raises(errors.UserError, match=r'other leaves') as raised:
    opened(tmp_path).restore(more)
  assert all(f'trainable/more{i} ' in str(raised.value) for i in range(30))
  assert names(tmp_path) == ['6', '7']


def test_another_format_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoints, 'FORMAT_VERSION', 4)
  save(tmp_path, 6, 7)
  monkeypatch.undo()
  with pytest.raises(errors.UserError, match='/7 has format 4, not 3'):
    opened(tmp_path).restore(state(0))
  # What was there before there were manifests.
  former = tmp_path / 'former'
  meta = former / 'checkpoints' / 'last' / '3' / 'meta'
  meta.mkdir(parents=True)
  (meta / 'metadata').write_text('{"format_version": 2}')
  with pytest.raises(errors.UserError, match='/3 has format 2 or older, not 3'):
    opened(former).restore(state(0))
  assert names(former) == ['3']


def test_the_best_is_replaced_only_by_a_better_one(tmp_path):
  saver = opened(tmp_path)
  saver.save(state(1))
  for step, metric in ((1, 0.5), (2, 0.7), (3, 0.7), (4, 0.6)):
    saver.save_best(state(step), metric)
  assert saver.best_metric() == 0.7
  saver.close()
  assert names(tmp_path, 'best') == ['2']
  saver = opened(tmp_path)
  saver.save(state(4))
  saver.close()
  assert opened(tmp_path).best_metric() == 0.7


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
  saver.save_best(state(3), 0.1)
  assert saver.best_metric() == 0.1
  saver.close()
  assert opened(tmp_path).best_metric() is None


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
  save(tmp_path, 3, 7)
  last = tmp_path / 'checkpoints' / 'last'
  shutil.copytree(last / '7', last / '.tmp-9')
  shutil.copytree(last / '7', last / '.tmp-deleted-1')
  assert opened(tmp_path).latest_step() == 7
  assert names(tmp_path) == ['3', '7']


def test_writes_are_in_order_and_the_host_holds_few_copies(tmp_path, monkeypatch):
  gate, order = threading.Semaphore(0), []
  write = checkpoint_files.write

  def slow(folder, arrays, meta):
    gate.acquire()
    order.append(f'{folder.parent.name}/{folder.name}')
    write(folder, arrays, meta)

  monkeypatch.setattr(checkpoint_files, 'write', slow)
  saver = opened(tmp_path)
  saver.save_best(state(1), 0.1)
  saver.save(state(1))
  saver.save_best(state(2), 0.2)  # One being written, two waiting.
  blocked = threading.Thread(target=saver.save, args=(state(2),))
  blocked.start()
  blocked.join(0.2)
  assert blocked.is_alive() and order == []
  gate.release()
  blocked.join(30)
  assert not blocked.is_alive()
  for _ in range(3):
    gate.release()
  saver.close()
  assert order == ['best/1', 'last/1', 'best/2', 'last/2']
