"""A trace of the steps that were asked for, and of no others."""

import jax
import jax.numpy as jnp
import pytest

from losa_scenic.common_lib import errors
from losa_scenic.train_lib import profile


@jax.jit
def train_step(x):
  return jnp.tanh(x @ x)


def run(profiler, steps, first=1):
  x = jnp.eye(16)
  for step in range(first, first + steps):
    with profiler.annotate(step):
      x = train_step(x)
    profiler.step(step, x)
  profiler.close()


def traces(workdir):
  return list(workdir.rglob('*.xplane.pb'))


def names_of(path):
  """What happened in a trace: [(name, numbers)]."""
  planes = jax.profiler.ProfileData.from_file(str(path)).planes
  return [(e.name, dict(e.stats)) for plane in planes for line in plane.lines for e in line.events]


def test_the_steps_after_the_fifth_of_this_process_are_traced(tmp_path):
  said = []
  run(profile.Profiler(tmp_path, 3, said.append), steps=12, first=101)
  (trace,) = traces(tmp_path / 'profile' / 'plugins' / 'profile')
  happened = names_of(trace)
  traced = [values['step_num'] for name, values in happened if name == 'train']
  assert traced == [106, 107, 108]
  assert any(name == 'PjitFunction(train_step)' for name, _ in happened)
  assert said == [
    'profile: tracing 3 steps from step 106 on',
    f'profile: 3 steps; open it with `tensorboard --logdir {tmp_path}`, PROFILE in its menu '
    '(needs `pip install tensorboard xprof`)',
  ]


def test_a_run_that_ends_within_its_trace_keeps_it(tmp_path, capsys):
  run(profile.Profiler(tmp_path, 100), steps=7)
  (trace,) = traces(tmp_path)
  assert [values['step_num'] for name, values in names_of(trace) if name == 'train'] == [6, 7]
  assert 'profile: 2 steps; open it' in capsys.readouterr().err


def test_a_run_that_is_too_short_says_so(tmp_path):
  said = []
  run(profile.Profiler(tmp_path, 3, said.append), steps=4)
  assert said == ['profile: no trace, because this process did no more than 5 steps']
  assert traces(tmp_path) == []


def test_no_steps_no_trace(tmp_path, capsys):
  run(profile.Profiler(tmp_path, 0), steps=8)
  assert list(tmp_path.iterdir()) == []
  assert capsys.readouterr().err == ''
  with pytest.raises(errors.UserError, match='profile_steps must be'):
    profile.Profiler(tmp_path, -1)


def test_a_trace_that_fails_ends_no_run(tmp_path):
  said = []
  with jax.profiler.trace(str(tmp_path / 'other')):
    run(profile.Profiler(tmp_path / 'run', 2, said.append), steps=8)
  assert len(said) == 1 and said[0].startswith('profile: no trace: ')
  (tmp_path / 'profile').write_text('a file where the folder would be')
  said.clear()
  run(profile.Profiler(tmp_path, 2, said.append), steps=8)
  assert said[-1].startswith('profile: no trace: ')


def test_each_process_has_its_own(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 4)
  monkeypatch.setattr(jax, 'process_index', lambda: 3)
  run(profile.Profiler(tmp_path, 1), steps=6)
  assert len(traces(tmp_path / 'profile' / 'process_3')) == 1
