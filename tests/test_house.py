"""Rules of the house that a machine can check."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = [
  *ROOT.glob('losa_scenic/**/*.py'),
  *ROOT.glob('configs/*.py'),
  *ROOT.glob('projects/**/*.py'),
  *ROOT.glob('tests/**/*.py'),
]


@pytest.mark.parametrize('command', [('check',), ('format', '--check')])
def test_ruff_passes(command):
  ruff = subprocess.run(
    [sys.executable, '-m', 'ruff', *command, '.'], cwd=ROOT, capture_output=True, text=True
  )
  assert ruff.returncode == 0, ruff.stdout + ruff.stderr


def test_no_file_is_longer_than_400_lines():
  lengths = {path.name: len(path.read_text().splitlines()) for path in SOURCES}
  assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_the_core_imports_no_tensorflow():
  code = (
    'import sys, losa_scenic.main, losa_scenic.sweep, losa_scenic.bench;'
    'print([m for m in ("tensorflow", "tensorflow_datasets", "clu", "torch") if m in sys.modules])'
  )
  python = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert python.stdout.strip() == '[]', python.stderr


def test_ci_runs_the_command_that_the_readme_gives():
  ci = (ROOT / '.ci' / 'run').read_text()
  (command,) = re.findall(r'^python3 -m venv .*pytest.*$', (ROOT / 'README.md').read_text(), re.M)
  assert command in ci.splitlines()
