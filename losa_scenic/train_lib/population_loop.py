"""The train loop of a population: the loop of every run, with measurements of each member."""

from collections.abc import Mapping
from typing import Any, NoReturn

from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Config
from losa_scenic.dataset_lib import dataset_utils
from losa_scenic.train_lib import evaluate, loop
from losa_scenic.train_lib.bad_steps import Diverged
from losa_scenic.train_lib.member_folder import FOLDER, MemberFolder
from losa_scenic.train_lib.population import BETWEEN, Population, state_of
from losa_scenic.train_lib.state import TrainState


class PopulationLoop(loop.Loop):
  """One run of a population, from a step on to its end.

  A member that has diverged keeps its state and is not measured any more. The others go on; the run
  ends when none is left.

  Attributes:
    diverged: the members that have, with the step at which each did.
    evaluations: the last values of each member that goes on, as in a run of its own.
  """

  def __init__(
    self,
    program: Population,
    state: TrainState,
    config: Config,
    dataset: dataset_utils.Dataset,
    around: loop.Surroundings,
    notes: Mapping[str, Any],
    folders: Mapping[str, MemberFolder],
  ):
    """As `Loop`, with the folders of the members."""
    super().__init__(program, state, config, dataset, around, notes)
    self.diverged: dict[str, int] = dict(notes.get('diverged', {}))
    self.evaluations: dict[str, dict[str, float]] = {}
    self._members, self._folders = program.members, folders

  def run(self) -> None:
    """As `Loop.run`; `Diverged` is raised where no member is left."""
    if len(self.diverged) == len(self._members):
      self._end()
    super().run()

  def of_members(self, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{'rank=8/loss': x} -> {'rank=8': {'loss': x}}, of members that go on."""
    tables: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
      name, _, rest = key.partition(BETWEEN)
      if name not in self.diverged:
        tables.setdefault(name, {})[rest] = value
    return tables

  def measured(self, split: str, watch: evaluate.Watch | None = None) -> Any:
    """The evaluation of each member, by name."""
    program, dataset = self._program, self._dataset
    total, shown = evaluate.measure(program, self.state, dataset, split, watch)
    return {
      name: evaluate.found(
        program, dataset, split, own, None if shown is None else (shown[0], shown[1][name])
      )
      for name, own in self.of_members(total).items()
    }

  def _measured(self, split: str) -> Any:
    return self.measured(split, self._watched(split))

  def _take(self, one: Any, values: dict[str, Any]) -> None:
    for name, own in self.of_members(values).items():
      in_a_row = int(own.pop('bad_steps')[0])
      if in_a_row:
        self._drop_of(name, one, own, in_a_row)
      else:
        self._tally.add({name + BETWEEN + key: value for key, value in own.items()})

  def _drop_of(self, name: str, one: Any, values: Mapping[str, Any], in_a_row: int) -> None:
    """Notes that a member's numbers were not finite."""
    around, images = self._around, self._dataset.train_ds.names(one.positions)
    bad_steps = self._folders[name].bad_steps
    line = bad_steps.add(one.number, values, one.positions.tolist(), images)
    around.bar.say(f'{name}: {line}')
    if in_a_row < self._config.max_bad_steps:
      return
    self.diverged[name] = one.number
    left = len(self._members) - len(self.diverged)
    around.bar.say(f'{name} has diverged and is left as it was; {left} of the population go on')
    if not left:
      self._end()

  def _end(self) -> NoReturn:
    """Saves, and ends the run."""
    saver, step = self._around.saver, int(self.state.global_step)
    kept = 'Nothing is saved.'
    try:
      saver.wait()
      if self._config.checkpoint:
        if (saver.latest_step() or 0) < step:
          self._save(step)
          saver.wait()
        kept = f'Their last good states are saved as step {step}.'
    except errors.UserError as e:
      kept = f'{e}'
    name, last = max(self.diverged.items(), key=lambda item: item[1])
    raise Diverged(
      f'All {len(self._members)} members of the population have diverged, {name} at step {last} as '
      f'the last one. {kept} What they saw is in {FOLDER}/NAME/bad_steps.jsonl. Lower the learning '
      'rates or clip gradients (max_grad_norm), and use another --workdir.'
    )

  def _log(self, step: int) -> None:
    around, rows = self._around, {}
    for name, means in self.of_members(self._tally.row()).items():
      dropped = self._folders[name].bad_steps.count
      rate = self._members[name].learning_rate(step - 1 - dropped)
      rows[name] = {f'train_{key}': value for key, value in means.items()}
      rows[name]['learning_rate'] = float(rate)
    if rows:
      best = min(rows, key=lambda name: rows[name]['train_loss'])
      around.bar.loss(rows[best]['train_loss'], of=best)
    common = {'epoch': step * self._program.epochs_per_step, **around.bar.interval()}
    for name, row in rows.items():
      self._folders[name].writer.write_scalars(step, row | common)
    joined = {f'{name}{BETWEEN}{key}': x for name, row in rows.items() for key, x in row.items()}
    self.train_summary = {key: x for key, x in joined.items() if f'{BETWEEN}train_' in key}
    around.writer.write_scalars(step, joined | common)

  def _write(self, step: int, found: Mapping[str, evaluate.Evaluation]) -> None:
    joined: dict[str, float] = {}
    for name, one in found.items():
      one.write(step, self._folders[name].writer)
      self.keep(name, one)
      joined |= {f'{name}{BETWEEN}{key}': value for key, value in one.values.items()}
    self._around.writer.write_scalars(step, joined)

  def keep(self, name: str, found: evaluate.Evaluation) -> None:
    """Takes an evaluation of a member for its last one."""
    self.evaluations.setdefault(name, {}).update(found.values)
    self.eval_summary |= {f'{name}{BETWEEN}{key}': value for key, value in found.values.items()}

  def _compare(self, step: int) -> None:
    accuracies = {
      name: values['valid_accuracy']
      for name, values in self.evaluations.items()
      if name not in self.diverged
    }
    order = sorted(accuracies, key=accuracies.__getitem__)
    best, worst = (f'{accuracies[name]:.4f} of {name}' for name in (order[-1], order[0]))
    self._around.bar.say(
      f'step {step}/{self._total}  valid accuracy at best {best}, at worst {worst}'
    )
    for name, accuracy in accuracies.items():
      self._folders[name].best(state_of(self.state, name), accuracy)

  def _save(self, step: int, evaluated: bool = True) -> None:
    for folder in self._folders.values():
      folder.flush()
    super()._save(step, evaluated)

  def _notes(self) -> dict[str, Any]:
    return super()._notes() | {'diverged': self.diverged}
