"""A run of a population from its config to its summaries, one of them for each member."""

import contextlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from losa_scenic.adapt_lib.method import split_head
from losa_scenic.bench_lib import results
from losa_scenic.common_lib import hosts, trees
from losa_scenic.common_lib.types import Array
from losa_scenic.model_lib.classification_model import ClassificationModel
from losa_scenic.train_lib import members, population, progress, sharding, summary, trainer
from losa_scenic.train_lib import workdir as workdir_lib
from losa_scenic.train_lib.loop import Loop, Surroundings
from losa_scenic.train_lib.member_folder import FOLDER, MemberFolder
from losa_scenic.train_lib.population import state_of
from losa_scenic.train_lib.population_loop import PopulationLoop
from losa_scenic.train_lib.program import Program
from losa_scenic.train_lib.state import TrainState


class PopulationRun(trainer.Run):
  """A run whose state is that of many.

  Beside what every run leaves, the workdir has a folder for each member (`MemberFolder`), and
  results.jsonl with a row for each, as a sweep of them would have written it.
  """

  def run(
    self, rng: Array, model_cls: type[ClassificationModel]
  ) -> tuple[TrainState, dict[str, float], dict[str, Any]]:
    """As `trainer.Run.run`; the content of summary.json has 'members'."""
    with contextlib.ExitStack() as self._opened:
      return super().run(rng, model_cls)

  def _built(self, rng: Array, model_cls: type[ClassificationModel]) -> tuple[Program, TrainState]:
    self._population, state = population.build_program(
      rng=rng, config=self._config, model_cls=model_cls, dataset=self._dataset
    )
    return self._population, state

  def _restarted(self, program: Program, state: TrainState, notes: Mapping[str, Any]) -> TrainState:
    # Unlike a run of its own, a member that has diverged cannot be tried again: the others have
    # gone on, and so have the batches.
    counts = dict.fromkeys(notes['diverged'], self._config.max_bad_steps)
    bad_steps = {name: np.asarray(counts.get(name, 0), np.int32) for name in state.bad_steps}
    return state.replace(bad_steps=sharding.replicate(bad_steps, program.mesh))

  def _prepare(self, start: int | None, notes: Mapping[str, Any]) -> None:
    super()._prepare(start, notes)
    if start is None:
      hosts.on_first(lambda: shutil.rmtree(self._workdir / FOLDER, ignore_errors=True))
    self._folders: dict[str, MemberFolder] = {}
    for name, member in self._population.members.items():
      evaluated = notes.get('evaluated', True)
      folder = MemberFolder(self._workdir, member, self._data, start, evaluated)
      self._opened.callback(folder.close)
      self._folders[name] = folder

  def _made_loop(
    self, program: Program, state: TrainState, around: Surroundings, notes: Mapping[str, Any]
  ) -> Loop:
    return PopulationLoop(
      self._population, state, self._config, self._dataset, around, notes, self._folders
    )

  def _headline(self, program: Program, state: TrainState, start: int | None) -> str:
    sizes = [trees.count(split_head(tree)[0]) for tree in state.trainable.values()]
    what = f'{min(sizes):,} to {max(sizes):,} trainable each, without the head'
    return (
      f'population of {len(sizes)} on {self._where(program, what, start)}\n'
      f'members: {", ".join(self._population.members)}; all see the batches of shuffle_seed '
      f'{self._config.shuffle_seed}'
    )

  def _finish(
    self, program: Program, loop: Loop, start: int | None, notes: Mapping[str, Any]
  ) -> dict[str, Any]:
    assert isinstance(loop, PopulationLoop)
    had_ended = start is not None and start >= program.total_steps
    if had_ended and notes.get('evaluated', True):
      for split in ('valid', 'test') if self._config.evaluate_test else ('valid',):
        if getattr(self._dataset, f'{split}_ds') is not None:
          for name, found in loop.measured(split).items():
            loop.keep(name, found)
      self._dataset.train_ds.bad_files.share(hosts.gather)
    self._writer.flush()
    contents = {
      name: self._content(loop, name, start)
      for name in self._population.members
      if name not in loop.diverged
    }
    for name, folder in self._folders.items():
      if name in contents:
        folder.last(state_of(loop.state, name))
      folder.flush()
    content = _joined(contents) | {'diverged': loop.diverged}

    def finish() -> None:
      for name, own in contents.items():
        own.update(summary.of_training(self._folders[name].path) if had_ended else {})
        workdir_lib.write_json(self._folders[name].path / 'summary.json', own)
      content.update(_joined(contents))
      rows = [self._row(name) | own for name, own in contents.items()]
      results.write_rows(self._workdir / 'results.jsonl', rows)
      workdir_lib.write_json(self._workdir / 'summary.json', content)
      print(_table(contents, loop.diverged, str(self._workdir)))

    hosts.on_first(finish)
    return content

  def _content(self, loop: PopulationLoop, name: str, start: int | None) -> dict[str, Any]:
    """The summary of a member; speed and memory are those of the whole run."""
    member = self._population.members[name]
    return summary.content(
      member.model,
      state_of(loop.state, name),
      self._population.frozen,
      member.config,
      self._dataset,
      start,
      self._bar,
      loop.evaluations.get(name, {}),
      bad_steps=self._folders[name].bad_steps.count,
    ) | {'population': len(self._folders)}

  def _row(self, name: str) -> results.Row:
    return {'run': name, **members.flags(self._population.members[name].overrides)}


def _joined(contents: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """What all summaries have in common, and under 'members' what each has of its own."""
  first = next(iter(contents.values()))
  common = {
    key: value
    for key, value in first.items()
    if 'accuracy' not in key and all(own[key] == value for own in contents.values())
  }
  own = {
    name: {key: value for key, value in content.items() if key not in common}
    for name, content in contents.items()
  }
  return common | {'members': own}


def _table(
  contents: Mapping[str, Mapping[str, Any]], diverged: Mapping[str, int], workdir: str
) -> str:
  """The population as a few lines for people, the best first."""
  first = next(iter(contents.values()))
  split = 'test' if first['test_accuracy'] is not None else 'valid'
  accuracy = {name: content[f'{split}_accuracy'] for name, content in contents.items()}
  rows: dict[str, Any] = {
    name: f'{100 * accuracy[name]:.2f} %  {contents[name]["trainable_params"]:,} trained'
    for name in sorted(accuracy, key=accuracy.__getitem__, reverse=True)
  }
  rows |= {name: f'diverged at step {step}' for name, step in diverged.items()}
  rows |= {'outputs': f'{workdir}, each in {FOLDER}/', 'curves': f'tensorboard --logdir {workdir}'}
  title = f'\n{split} accuracy on {first["dataset"]}, backbone {first["backbone"]}'
  return progress.table(title, rows)
