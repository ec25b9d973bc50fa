"""run.json: complete, atomic, of every start, and never in the way of a run."""

import datetime
import json
import os
import pathlib
import shlex
import shutil
import socket
import subprocess
import sys
import time

import jax
import numpy
import pytest

import losa_scenic
from losa_scenic.common_lib import hosts
from losa_scenic.train_lib import run_config, run_record

CONFIG = run_config.default_config().to_dict()
MESH = {'data': 2, 'fsdp': 1}


def starts(workdir):
  return json.loads((workdir / 'run.json').read_text())['starts']


def test_every_start_adds_an_entry(tmp_path):
  before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
  first = run_record.RunRecord(tmp_path)
  first.start(CONFIG, MESH, None)
  (entry,) = starts(tmp_path)
  assert before <= datetime.datetime.fromisoformat(entry['started'])
  assert entry['started'].endswith('+00:00')
  assert entry['from_step'] is entry['ended'] is entry['how'] is entry['step'] is None
  assert (entry['host'], entry['process_id']) == (socket.gethostname(), os.getpid())
  assert shlex.split(entry['command'])[0] == sys.orig_argv[0]
  assert (entry['processes'], entry['devices']) == (1, jax.device_count())
  assert (entry['device_kind'], entry['mesh']) == (jax.devices()[0].device_kind, MESH)
  assert entry['versions']['losa_scenic'] == losa_scenic.__version__
  assert entry['versions']['jax'] == jax.__version__
  assert entry['versions']['numpy'] == numpy.__version__
  assert all(entry['versions'].values())
  assert entry['config'] == CONFIG

  first.end('stopped by SIGTERM', 7)
  second = run_record.RunRecord(tmp_path)
  second.start(CONFIG, MESH, 7)  # And is killed.
  third = run_record.RunRecord(tmp_path)
  third.start(CONFIG, MESH, 7)
  third.end('finished', 9)
  ends = [(e['from_step'], e['how'], e['step'], e['ended'] is None) for e in starts(tmp_path)]
  assert ends == [
    (None, 'stopped by SIGTERM', 7, False),
    (7, None, None, True),
    (7, 'finished', 9, False),
  ]
  assert [path.name for path in tmp_path.iterdir()] == ['run.json']


@pytest.mark.parametrize(
  'text',
  ['', '{"starts": [{"host": "a"', '[]', '{}', '{"starts": [1]}', '{"starts": 3}', '\x00' * 9],
)
def test_a_damaged_file_is_set_aside(tmp_path, capsys, text):
  path = tmp_path / 'run.json'
  path.write_text(text)
  run_record.RunRecord(tmp_path).start(CONFIG, MESH, 3)
  assert [entry['from_step'] for entry in starts(tmp_path)] == [3]
  assert (tmp_path / 'run.json.damaged').read_text() == text
  assert capsys.readouterr().err == (
    f'{path} is damaged: it is run.json.damaged now, and a new one begins.\n'
  )


def test_a_damaged_file_of_bytes_that_are_no_text(tmp_path):
  (tmp_path / 'run.json').write_bytes(b'\xff\xfe{')
  run_record.RunRecord(tmp_path).start(CONFIG, MESH, None)
  assert len(starts(tmp_path)) == 1


def test_an_end_that_cannot_be_written_is_said(tmp_path, capsys):
  folder = tmp_path / 'run'
  folder.mkdir()
  record = run_record.RunRecord(folder)
  record.end('finished', 1)  # Nothing was started.
  assert list(folder.iterdir()) == []
  record.start(CONFIG, MESH, None)
  shutil.rmtree(folder)
  record.end('finished', 1)
  assert 'run.json was not completed: No such file' in capsys.readouterr().err


def test_only_the_first_process_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(hosts, 'is_first', lambda: False)
  record = run_record.RunRecord(tmp_path)
  record.start(CONFIG, MESH, None)
  record.end('finished', 1)
  assert list(tmp_path.iterdir()) == []


def git(folder, *command):
  names = ('-c', 'user.name=A', '-c', 'user.email=a@example.org')
  subprocess.run(['git', *names, *command], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def package(tmp_path):
  """A package at the top of a checkout, with one commit."""
  package = tmp_path / 'checkout' / 'package'
  package.mkdir(parents=True)
  (package / 'code.py').write_text('one = 1\n')
  git(package.parent, 'init', '-q')
  git(package.parent, 'add', '.')
  git(package.parent, 'commit', '-qm', 'one')
  return package


def test_the_commit_and_whether_the_code_differs_from_it(package, monkeypatch):
  head = (package.parent / '.git' / 'HEAD').read_text().split()[1]
  commit = (package.parent / '.git' / head).read_text().strip()
  clean, dirty = ({'commit': commit, 'dirty': value} for value in (False, True))
  monkeypatch.setenv('GIT_DIR', '/nowhere')  # As in a hook.
  assert run_record.git_state(package) == clean
  (package.parent / 'runs.txt').touch()  # No code.
  assert run_record.git_state(package) == clean
  (package / 'code.py').write_text('one = 2\n')
  assert run_record.git_state(package) == dirty
  (package / 'code.py').write_text('one = 1\n')
  assert run_record.git_state(package) == clean
  (package / 'new.py').touch()
  assert run_record.git_state(package) == dirty


def test_a_checkout_without_a_commit(tmp_path):
  (tmp_path / 'package').mkdir()
  git(tmp_path, 'init', '-q')
  assert run_record.git_state(tmp_path / 'package') == {'commit': None, 'dirty': False}


def test_a_package_installed_inside_somebody_elses_checkout_has_none(package):
  installed = package.parent / 'venv' / 'package'
  installed.mkdir(parents=True)
  assert run_record.git_state(installed) is None


@pytest.mark.parametrize('script', [None, 'exit 128', 'exec sleep 30', 'kill -9 $$'])
def test_no_git_or_a_bad_one_matters_little(package, monkeypatch, tmp_path, script):
  programs = tmp_path / 'bin'
  programs.mkdir()
  if script is not None:
    (programs / 'git').write_text(f'#!/bin/sh\n{script}\n')
    (programs / 'git').chmod(0o755)
  (programs / 'sleep').symlink_to(pathlib.Path(shutil.which('sleep') or ''))
  monkeypatch.setenv('PATH', str(programs))
  began = time.monotonic()
  assert run_record.git_state(package) is None
  assert time.monotonic() - began < 2.0
