"""Damaged checkpoints are named and set aside, failed saves are told: nothing goes on silently."""

import pathlib
import shutil

import numpy as np
import pytest
from reference.run_states import assert_same, names, opened, save, state

from losa_scenic.common_lib import errors
from losa_scenic.train_lib import checkpoint_files

KINDS = ('flip', 'truncate', 'delete', 'zero', 'swap')


@pytest.fixture(scope='module')
def pristine(tmp_path_factory) -> pathlib.Path:
  path = tmp_path_factory.mktemp('run')
  save(path, 30, 40)
  return path


def damage(kind: str, file: pathlib.Path, others: list[pathlib.Path], rng) -> list[pathlib.Path]:
  """Damages a file; returns those that are no longer what they were."""
  content = bytearray(file.read_bytes())
  before, changed = bytes(content), [file]
  if kind == 'flip':
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
  elif kind == 'truncate':
    del content[rng.integers(len(content)) :]
  elif kind == 'zero':
    start = rng.integers(len(content))
    end = min(len(content), start + 64)
    content[start:end] = bytes(end - start)
  elif kind == 'delete':
    file.unlink()
    return changed
  else:
    other = others[rng.integers(len(others))]
    content = other.read_bytes()
    other.write_bytes(before)
    changed.append(other)
  file.write_bytes(content)
  return [] if bytes(content) == before else changed


def test_damage_of_the_newest_is_found_or_harmless(pristine, tmp_path, capfd):
  like, wanted = state(0), {step: state(step) for step in (30, 40)}
  harmless, hit = 0, set()
  for number in range(200):
    work = tmp_path / str(number)
    shutil.copytree(pristine, work)
    folder = work / 'checkpoints' / 'last' / '40'
    files = sorted(folder.iterdir())
    file = files[number % len(files)]
    kind = KINDS[(number + number // len(files)) % len(KINDS)]
    rng = np.random.default_rng(number)
    changed = damage(kind, file, [f for f in files if f != file], rng)
    capfd.readouterr()
    saver = opened(work)
    restored, notes = saver.restore(like)
    saver.close()
    lines = capfd.readouterr().err.splitlines()
    step = 30 if changed else 40
    assert_same(restored, wanted[step])
    assert notes == {'sums': [0.1, step]}
    if changed:
      (line,) = lines
      named = [f for f in changed if line.startswith(f'checkpoint 40: {f.relative_to(folder)} ')]
      assert named, f'{kind} of {changed}: {line}'
      assert line.endswith('set aside as 40.damaged, continuing from 30')
      assert names(work) == ['30', '40.damaged']
      hit.add((kind, file.name))
    else:
      assert lines == [] and names(work) == ['30', '40']
      harmless += 1
    shutil.rmtree(work)
  assert len(hit) == len(files) * len(KINDS) and harmless < 10


def flip(file: pathlib.Path) -> None:
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)


def test_an_added_file_is_damage(pristine, tmp_path, capfd):
  shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
  (tmp_path / 'checkpoints' / 'last' / '40' / 'more').write_text('')
  opened(tmp_path).restore(state(0))
  assert 'more is not in the manifest' in capfd.readouterr().err


def test_the_walk_goes_back_as_far_as_needed_and_the_run_goes_on(tmp_path, capfd):
  saver = opened(tmp_path, keep=3)
  for step in (10, 20, 30):
    saver.save(state(step))
  saver.close()
  last = tmp_path / 'checkpoints' / 'last'
  flip(last / '30' / 'meta.json')
  (last / '20' / 'manifest.json').unlink()
  (last / '30.damaged').mkdir()
  saver = opened(tmp_path, keep=3)
  assert saver.latest_step() == 30
  assert_same(saver.restore(state(0))[0], state(10))
  one, two = capfd.readouterr().err.splitlines()
  assert 'checkpoint 30: meta.json is damaged' in one and '30.damaged-2' in one
  assert 'checkpoint 20: manifest.json is missing; set aside as 20.damaged' in two
  saver.save(state(20))
  saver.save(state(30))
  saver.close()
  assert names(tmp_path) == ['10', '20', '20.damaged', '30', '30.damaged', '30.damaged-2']
  assert_same(opened(tmp_path).restore(state(0))[0], state(30))


def test_only_damage_stops_the_run_at_every_start(pristine, tmp_path):
  shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
  last = tmp_path / 'checkpoints' / 'last'
  flip(last / '30' / 'meta.json')
  flip(last / '40' / 'manifest.json')
  for _ in range(2):
    saver = opened(tmp_path)
    assert saver.latest_step() == 40
    with pytest.raises(errors.UserError, match=r'(?s)40: manifest.json .*30: meta.json') as raised:
      saver.restore(state(0))
    assert f'delete {tmp_path / "checkpoints"} to start over' in str(raised.value)
    assert names(tmp_path) == ['30', '40']
    saver.close()
  for step in ('30', '40'):
    (last / step).rename(last / f'{step}.damaged')
  for _ in range(2):
    saver = opened(tmp_path)
    with pytest.raises(errors.UserError, match=r'(?s)30.damaged: set aside.*40.damaged'):
      saver.latest_step()
    with pytest.raises(errors.UserError, match=r'40\.damaged'):
      saver.restore(state(0))
  shutil.rmtree(tmp_path / 'checkpoints')
  assert opened(tmp_path).latest_step() is None


def test_the_best_survives_when_the_last_are_all_damaged(tmp_path):
  saver = opened(tmp_path)
  saver.save_best(state(4), 0.5)
  saver.save(state(4))
  saver.close()
  flip(tmp_path / 'checkpoints' / 'last' / '4' / 'meta.json')
  for _ in range(2):
    with pytest.raises(errors.UserError, match=r'4: meta\.json is damaged'):
      opened(tmp_path).restore(state(0))
  (tmp_path / 'checkpoints' / 'last' / '4').rename(tmp_path / 'checkpoints' / 'last' / '4.damaged')
  opened(tmp_path)
  assert names(tmp_path, 'best') == ['4']


def test_a_damaged_best_is_set_aside(tmp_path, capfd):
  saver = opened(tmp_path)
  saver.save_best(state(4), 0.5)
  saver.save(state(4))
  saver.close()
  flip(tmp_path / 'checkpoints' / 'best' / '4' / 'state.safetensors')
  saver = opened(tmp_path)
  assert_same(saver.restore(state(0))[0], state(4))
  (line,) = capfd.readouterr().err.splitlines()
  assert line.startswith('best checkpoint 4: state.safetensors is damaged')
  assert saver.best_metric() is None
  saver.save_best(state(6), 0.1)
  saver.close()
  assert names(tmp_path, 'best') == ['4.damaged', '6']


def test_a_directory_that_is_gone_is_told_at_the_next_step(tmp_path):
  save(tmp_path, 1)
  saver = opened(tmp_path)
  saver.check()
  shutil.rmtree(tmp_path / 'checkpoints' / 'last')
  saver.save(state(2))
  saver._writer._jobs[-1].result(30)
  with pytest.raises(errors.UserError) as raised:
    saver.check()
  message = str(raised.value)
  assert f'{tmp_path / "checkpoints" / "last" / "2"}: No such file or directory' in message
  assert message.endswith('There is none.')
  with pytest.raises(errors.UserError, match='No such file'):
    saver.save(state(3))
  saver.close()  # Told already.


def test_a_directory_that_goes_inside_a_save_leaves_nothing_half(tmp_path, monkeypatch):
  saver = opened(tmp_path)
  facts = checkpoint_files._facts

  def gone(file):
    shutil.rmtree(tmp_path / 'checkpoints' / 'last', ignore_errors=True)
    return facts(file)

  monkeypatch.setattr(checkpoint_files, '_facts', gone)
  saver.save(state(2))
  with pytest.raises(errors.UserError, match=r'last/2: No such file'):
    saver.close()
  assert opened(tmp_path).latest_step() is None and names(tmp_path) == []


def test_nothing_is_written_after_a_failure_and_close_tells_it(tmp_path):
  saver = opened(tmp_path)
  shutil.rmtree(tmp_path / 'checkpoints' / 'best')
  saver.save_best(state(2), 0.5)
  saver._writer._jobs[-1].result(30)
  with pytest.raises(errors.UserError, match='best/2: No such file'):
    saver.close()
  assert names(tmp_path) == []
