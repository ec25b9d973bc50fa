"""Sweeps with real subprocesses: a small stand-in for losa_scenic.main does as its flags say."""

import fcntl
import json
import os
import pathlib
import pty
import shlex
import signal
import struct
import subprocess
import sys
import termios
import threading
import time

import pytest

from losa_scenic import sweep
from losa_scenic.bench_lib import results
from losa_scenic.common_lib import errors

FAKE_MAIN = """
import json, os, pathlib, signal, sys, time

flags = dict(a.removeprefix('--').split('=', 1) for a in sys.argv[1:])
workdir = pathlib.Path(flags['workdir'])
workdir.mkdir(parents=True, exist_ok=True)
what, sleep = flags.get('config.do', 'finish'), float(flags.get('config.sleep', 0))
starts = workdir / 'starts'
count = int(starts.read_text()) + 1 if starts.exists() else 1
starts.write_text(str(count))
(workdir / 'pid').write_text(str(os.getpid()))
seen = ('CUDA_VISIBLE_DEVICES', 'XLA_PYTHON_CLIENT_PREALLOCATE')
(workdir / 'environment').write_text(json.dumps({k: os.environ.get(k) for k in seen}))
(workdir / 'times').write_text(json.dumps([time.time(), time.time() + sleep]))
print('start number', count)
if what == 'stubborn':
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
(workdir / 'ready').touch()
if what in ('hang', 'stubborn') and not (workdir.parent / 'go').exists():
  time.sleep(60)
time.sleep(sleep)
if what == 'fail' and count == 1:
  print('first line\\n' * 50 + 'error: the cause', file=sys.stderr)
  sys.exit(3)
if what == 'crash':
  os.kill(os.getpid(), signal.SIGKILL)
if what != 'nothing':
  text = json.dumps({'test_accuracy': 0.5, 'seed': int(flags.get('config.seed', 0))})
  (workdir / 'summary.json').write_text('{' if what == 'torn' else text)
"""


@pytest.fixture
def place(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
  """A folder with the stand-in importable as `fake_main`; also the place of configs."""
  (tmp_path / 'fake_main.py').write_text(FAKE_MAIN)
  path = [str(tmp_path), str(pathlib.Path(sweep.__file__).parents[1])]
  monkeypatch.setenv('PYTHONPATH', os.pathsep.join(path))
  monkeypatch.setenv('PYTHONDONTWRITEBYTECODE', '1')
  for name in ('XLA_PYTHON_CLIENT_PREALLOCATE', 'CUDA_VISIBLE_DEVICES'):
    monkeypatch.delenv(name, raising=False)
  return tmp_path


def _config(place: pathlib.Path, expression: str, name: str = 'config.py') -> str:
  path = place / name
  path.write_text(f'def get_hyper(hyper):\n  return {expression}\n')
  return str(path)


def _seeds(count: int) -> str:
  return f"hyper.sweep('config.seed', range({count}))"


def _doing(*what: str) -> str:
  return f"hyper.sweep('config.do', {list(what)})"


def _main(config: str, workdir: pathlib.Path, *more: str) -> int:
  return sweep.main([f'--config={config}', f'--workdir={workdir}', *more], main_module='fake_main')


def _started(
  config: str, workdir: pathlib.Path, *more: str, stderr: int = subprocess.PIPE
) -> subprocess.Popen[str]:
  """The sweep's command line in a process of its own, to be sent signals."""
  # Whoever runs the tests in the background may have had these signals ignored.
  code = 'import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); '
  code += 'signal.signal(signal.SIGHUP, signal.SIG_DFL); from losa_scenic import sweep; '
  code += "sys.exit(sweep.main(sys.argv[1:], main_module='fake_main'))"
  command = [sys.executable, '-c', code, f'--config={config}', f'--workdir={workdir}', *more]
  return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)


def _wait_for(workdir: pathlib.Path, name: str, count: int) -> list[pathlib.Path]:
  deadline = time.monotonic() + 20
  while time.monotonic() < deadline:
    found = sorted(workdir.glob(f'*/{name}'))
    if len(found) >= count:
      return found
    time.sleep(0.02)
  raise AssertionError(f'no {count} files {name} in {workdir}')


def _alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  return True


def _starts(workdir: pathlib.Path) -> list[int]:
  return [int(path.read_text()) for path in sorted(workdir.glob('*/starts'))]


def test_runs_all_and_gathers_in_order(place, capsys):
  config, workdir = _config(place, _seeds(3)), place / 'w'
  copy = place / 'copy' / 'rows.jsonl'
  assert _main(config, workdir, '--slots=2', f'--save-results={copy}', '--config.x=a b') == 0
  rows = results.read_rows(workdir / 'results.jsonl')
  assert [row['config.seed'] for row in rows] == [0, 1, 2] == [row['seed'] for row in rows]
  assert {row['config.x'] for row in rows} == {'a b'}
  assert results.read_rows(copy) == rows
  directory = workdir / rows[0]['run']
  assert results.read_object(directory / 'overrides.json') == {'config.x': 'a b', 'config.seed': 0}
  log = (directory / 'run.log').read_text()
  assert log.startswith('$ ') and '--config.seed=0' in log and log.endswith('start number 1\n')
  assert '3 of 3 runs finished, 0 failed' in capsys.readouterr().out


def test_slots_bound_the_runs_at_a_time(place):
  config, workdir = _config(place, _seeds(4)), place / 'w'
  assert _main(config, workdir, '--slots=2', '--config.sleep=0.5') == 0
  spans = [json.loads(path.read_text()) for path in workdir.glob('*/times')]
  at_once = [sum(a <= begin < b for a, b in spans) for begin, _ in spans]
  assert max(at_once) == 2


def test_finished_runs_are_skipped_and_new_ones_added(place, capsys):
  workdir = place / 'w'
  assert _main(_config(place, _seeds(1)), workdir) == 0
  assert _main(_config(place, _seeds(2)), workdir) == 0
  assert _starts(workdir) == [1, 1]
  assert len(results.read_rows(workdir / 'results.jsonl')) == 2
  assert _main(_config(place, _seeds(1)), workdir) == 0
  assert '1 directories here belong to no run of this sweep' in capsys.readouterr().out
  assert len(results.read_rows(workdir / 'results.jsonl')) == 1


def test_failures_do_not_stop_the_others_and_show_their_log(place, capsys):
  config = _config(place, _doing('fail', 'crash', 'nothing', 'finish'))
  workdir = place / 'w'
  assert _main(config, workdir) == 1
  shown = capsys.readouterr()
  assert 'exit code 3' in shown.err and '  | error: the cause' in shown.err
  assert shown.err.count('first line') == 14
  assert 'killed by signal 9' in shown.err
  assert 'exit code 0 without a summary.json' in shown.err
  assert '1 of 4 runs finished, 3 failed' in shown.out
  assert [row['config.do'] for row in results.read_rows(workdir / 'results.jsonl')] == ['finish']
  assert _main(config, workdir) == 1, 'crash and nothing fail again, fail ends well'
  assert 'first line' not in capsys.readouterr().err
  assert sorted(_starts(workdir)) == [1, 2, 2, 2]
  assert len(results.read_rows(workdir / 'results.jsonl')) == 2


def test_torn_summary_is_a_failure_then_an_error(place, capsys):
  config, workdir = _config(place, _doing('torn')), place / 'w'
  assert _main(config, workdir) == 1
  assert 'not valid JSON' in capsys.readouterr().err
  assert _main(config, workdir) == 2
  assert 'summary.json: not valid JSON' in capsys.readouterr().err


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_the_runs_and_a_rerun_continues(place, number):
  config, workdir = _config(place, _doing('finish', 'hang')), place / 'w'
  process = _started(config, workdir, '--slots=2')
  _wait_for(workdir, 'ready', 2)
  _wait_for(workdir, 'summary.json', 1)
  process.send_signal(number)
  out, err = process.communicate(timeout=20)
  assert process.returncode == 128 + number, err
  assert f'Stopped by {number.name}' in err
  assert 'failed:' not in err and '1 of 2 runs finished, 0 failed' in out
  assert not any(_alive(int(path.read_text())) for path in workdir.glob('*/pid'))
  (workdir / 'go').touch()
  assert _main(config, workdir) == 0
  assert sorted(_starts(workdir)) == [1, 2]


def test_a_second_signal_kills_a_run_that_ignores_sigterm(place):
  config, workdir = _config(place, _doing('stubborn')), place / 'w'
  process = _started(config, workdir)
  pid = int(_wait_for(workdir, 'ready', 1)[0].with_name('pid').read_text())
  process.send_signal(signal.SIGINT)
  while 'stopping 1 runs' not in process.stdout.readline():
    assert process.poll() is None
  assert _alive(pid)
  process.send_signal(signal.SIGINT)
  process.communicate(timeout=10)
  assert process.returncode == 130
  assert not _alive(pid)


def test_a_run_that_ignores_sigterm_is_killed_after_the_grace(place):
  config, workdir = _config(place, _doing('stubborn')), place / 'w'

  def stop() -> None:
    _wait_for(workdir, 'ready', 1)
    os.kill(os.getpid(), signal.SIGTERM)

  thread = threading.Thread(target=stop)
  thread.start()
  handler = signal.getsignal(signal.SIGTERM)
  begin = time.monotonic()
  code = sweep.run_sweep(config, workdir, main_module='fake_main', grace_seconds=0.5)
  thread.join()
  assert code == 128 + signal.SIGTERM
  assert 0.5 < time.monotonic() - begin < 10
  assert signal.getsignal(signal.SIGTERM) is handler
  assert not _alive(int(next(workdir.glob('*/pid')).read_text()))


def test_an_error_of_the_sweep_itself_ends_the_runs(place, capsys):
  config, workdir = _config(place, _doing('finish', 'hang')), place / 'w'
  target = place / 'rows.jsonl'

  def obstruct() -> None:
    _wait_for(workdir, 'starts', 1)
    target.unlink()
    target.mkdir()

  thread = threading.Thread(target=obstruct)
  thread.start()
  more = ['--slots=2', f'--save-results={target}', '--config.sleep=1']
  assert _main(config, workdir, *more) == 2
  thread.join()
  assert 'Is a directory' in capsys.readouterr().err
  assert not any(_alive(int(path.read_text())) for path in workdir.glob('*/pid'))


def test_a_terminal_shows_a_bar(place):
  config, workdir = _config(place, _doing('finish', 'fail')), place / 'w'
  ours, theirs = pty.openpty()
  fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 120, 0, 0))
  process = _started(config, workdir, stderr=theirs)
  out, _ = process.communicate(timeout=20)
  shown = os.read(ours, 65536).decode()
  os.close(ours)
  os.close(theirs)
  assert process.returncode == 1
  assert '2/2 |' in shown and '1/2 finished, 0 running, 1 failed' in shown
  assert 'finished do=finish-' in out and '|' not in out


def test_a_killed_sweep_leaves_no_lock(place):
  config, workdir = _config(place, _doing('hang')), place / 'w'
  process = _started(config, workdir)
  pid = int(_wait_for(workdir, 'ready', 1)[0].with_name('pid').read_text())
  process.kill()
  process.communicate(timeout=10)
  os.kill(pid, signal.SIGKILL)
  (workdir / 'go').touch()
  assert _main(config, workdir) == 0
  assert _starts(workdir) == [2]


def test_two_sweeps_in_one_directory_are_refused(place, capsys):
  config, workdir = _config(place, _doing('hang')), place / 'w'
  process = _started(config, workdir)
  _wait_for(workdir, 'ready', 1)
  try:
    assert _main(config, workdir) == 2
    assert f'error: Another sweep (process {process.pid} on ' in capsys.readouterr().err
    assert _main(config, workdir, '--dry-run') == 0
    assert '# continue: do=hang-' in capsys.readouterr().out
  finally:
    process.terminate()
    process.communicate(timeout=20)
  assert _starts(workdir) == [1]


def test_dry_run_starts_and_writes_nothing(place, capsys):
  config, workdir = _config(place, _seeds(2)), place / 'w'
  assert _main(config, workdir, '--dry-run', "--config.x=it's") == 0
  assert not workdir.exists()
  commands = [c for c in capsys.readouterr().out.split('\n') if c and not c.startswith('#')]
  assert [shlex.split(command)[-1] for command in commands] == [
    '--config.seed=0',
    '--config.seed=1',
  ]
  assert "--config.x=it's" in shlex.split(commands[0])
  subprocess.run(commands[0], shell=True, check=True)
  assert _main(config, workdir, "--config.x=it's") == 0
  assert _starts(workdir) == [1, 1], 'a command started by hand counts'


def test_dry_run_names_what_is_finished(place, capsys):
  workdir = place / 'w'
  assert _main(_config(place, _seeds(1)), workdir) == 0
  assert _main(_config(place, _seeds(2)), workdir, '--dry-run') == 0
  out = capsys.readouterr().out
  assert '# skip, finished: seed=0-' in out and '# start: seed=1-' in out
  assert '# 1 to run, 1 finished' in out


def test_changed_overrides(place, capsys):
  config, workdir = _config(place, _seeds(1)), place / 'w'
  assert _main(config, workdir, '--config.x=1') == 0
  assert _main(config, workdir, '--config.x=2') == 0
  directories = sorted(path.parent for path in workdir.glob('*/summary.json'))
  assert len(directories) == 2, 'other overrides, other directory'
  stored = directories[0] / 'overrides.json'
  results.write_object(stored, {'config.x': '3'})
  codes = [_main(config, workdir, f'--config.x={x}') for x in (1, 2)]
  assert sorted(codes) == [0, 2]
  assert 'holds a run with other overrides' in capsys.readouterr().err


def test_another_config_in_the_same_directory_is_refused(place, capsys):
  workdir = place / 'w'
  assert _main(_config(place, _seeds(1)), workdir) == 0
  assert _main(_config(place, _seeds(1), 'other.py'), workdir) == 2
  assert "holds a sweep of 'config.py', not of 'other.py'" in capsys.readouterr().err


def test_slots_and_devices(monkeypatch):
  monkeypatch.delenv('XLA_PYTHON_CLIENT_PREALLOCATE', raising=False)
  off = {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
  assert sweep.slot_environments(1) == [{}]
  assert sweep.slot_environments(2) == [off, off]
  one, two = {'CUDA_VISIBLE_DEVICES': '0'}, {'CUDA_VISIBLE_DEVICES': '3'}
  assert sweep.slot_environments(2, ['0', '3']) == [one, two]
  assert sweep.slot_environments(3, ['0', '3']) == [one | off, two | off, one | off]
  monkeypatch.setenv('XLA_PYTHON_CLIENT_PREALLOCATE', 'true')
  assert sweep.slot_environments(2) == [{}, {}]
  for slots, devices in ((0, ()), (1, ['']), (2, ['0', '0'])):
    with pytest.raises(errors.UserError):
      sweep.slot_environments(slots, devices)


def test_children_see_their_device(place):
  config, workdir = _config(place, _seeds(2)), place / 'w'
  assert _main(config, workdir, '--slots=2', '--devices=4,5', '--config.sleep=0.3') == 0
  seen = [json.loads(path.read_text()) for path in workdir.glob('*/environment')]
  assert sorted(entry['CUDA_VISIBLE_DEVICES'] for entry in seen) == ['4', '5']
  assert {entry['XLA_PYTHON_CLIENT_PREALLOCATE'] for entry in seen} == {None}


@pytest.mark.parametrize(
  ('more', 'message'),
  [
    (['--slots=0'], '--slots must be at least 1, got 0'),
    (['--config.seed=1'], "'config.seed' is given for every run, but get_hyper"),
    (['--config.x'], 'must have the form --config.KEY=VALUE'),
    (['--config.x=1', '--noconfig.x'], "'--config.x' is given twice"),
  ],
)
def test_command_line_errors(place, capsys, more: list[str], message: str):
  assert _main(_config(place, _seeds(1)), place / 'w', *more) == 2
  assert message in capsys.readouterr().err
  assert not (place / 'w').exists()


def test_workdir_errors(place, capsys):
  config = _config(place, _seeds(1))
  assert _main(config, pathlib.Path(config)) == 2
  assert 'is a file, not a folder' in capsys.readouterr().err
  with pytest.raises(errors.UserError, match='local folder'):
    sweep.plan(config, 'gs://bucket/x')
  with pytest.raises(SystemExit):
    _main(config, place / 'w', '--slot=2')


def test_split_overrides():
  given = ['--slots=2', '--config.a.b=x=y', '--config=f.py', '--noconfig.c', '--config.d=']
  expected = {'config.a.b': 'x=y', 'config.c': 'False', 'config.d': ''}
  assert sweep.split_overrides(given) == (expected, ['--slots=2', '--config=f.py'])
