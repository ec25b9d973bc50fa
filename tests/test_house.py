"""Rules of the house that a machine can check."""

import pathlib
import re
import subprocess
import sys

import pytest
from reference import kinds

from losa_scenic.adapt_lib import methods
from losa_scenic.model_lib import presets

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


@pytest.mark.parametrize('name', sorted(methods.METHODS))
def test_a_method_is_one_short_file(name):
  path = pathlib.Path(sys.modules[methods.METHODS[name].__module__].__file__)
  options = {'hst': {'stages': 3}}.get(name, {})
  built = methods.build(name, presets.preset('test/8', **kinds.changes(name)), options)
  # DTL's side network rides along inside the encoder.
  is_side = built.side is not None or name == 'dtl'
  assert len(path.read_text().splitlines()) <= (200 if is_side else 120)


def test_backbones_import_no_method_and_methods_import_no_other():
  imported = re.compile(r'losa_scenic\.adapt_lib(?: import (.*)|\.(\w+) import)')
  methods_files = {build.__module__.split('.')[-1] for build in methods.METHODS.values()}
  for path in SOURCES:
    if path.parent.name not in ('adapt_lib', 'model_lib') or 'tests' in path.parts:
      continue
    text = path.read_text().replace('(\n', '').replace(',\n', ',')
    names = {n.strip() for a, b in imported.findall(text) for n in (a or b).strip('()').split(',')}
    others = names & methods_files - {path.stem}
    assert path.stem in ('methods', 'classification_model') or not others, f'{path} {others}'


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
