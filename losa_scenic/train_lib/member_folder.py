"""What a member of a population leaves: a folder like the workdir of a run of its own.

`<workdir>/members/<name>` has config.json (that of the run alone), metrics.jsonl and TensorBoard's
events, bad_steps.jsonl, checkpoints/best, and at the end checkpoints/last and summary.json. Until
then the member's state is in the population's checkpoints.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from losa_scenic.common_lib import hosts
from losa_scenic.train_lib import checkpoints, writers
from losa_scenic.train_lib import workdir as workdir_lib
from losa_scenic.train_lib.bad_steps import BadSteps
from losa_scenic.train_lib.population import Member
from losa_scenic.train_lib.state import TrainState

FOLDER = 'members'


class MemberFolder:
  """The folder of one member. All processes call the same methods; the first one writes.

  Attributes:
    path: of the folder.
    writer: the member's measurements, named as in a run of its own.
    saver: the member's checkpoints, of states of its own (`population.state_of`).
    bad_steps: the member's steps that were dropped.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    member: Member,
    data: Mapping[str, Any],
    start: int | None,
    evaluated: bool,
  ):
    """Makes the folder that of a run that goes on from a step, or begins.

    Args:
      workdir: of the population.
      member: whose folder it is.
      data: what identifies the data.
      start: steps done; None at the beginning.
      evaluated: whether the evaluation of that step counts too.
    """
    self.path = workdir / FOLDER / member.name
    self.writer = writers.MultiWriter()
    self._checkpoint = member.config.checkpoint
    hosts.on_first(lambda: self._open(member, start, evaluated))
    identity = member.model.identity() | {'data': dict(data)}
    self.saver = checkpoints.Checkpoints(self.path, identity, 1, restored=start)
    limit = member.config.max_bad_steps
    self.bad_steps = BadSteps(self.path / 'bad_steps.jsonl', start or 0, limit)

  def _open(self, member: Member, start: int | None, evaluated: bool) -> None:
    plain = member.config.to_dict()
    self.path.mkdir(parents=True, exist_ok=True)
    workdir_lib.write_json(self.path / 'config.json', plain)
    self.writer = writers.create_default_writer(self.path)
    self.writer.rewind(-1 if start is None else start, evaluated)
    if start is None:
      self.writer.write_texts(0, {'config': f'```\n{json.dumps(plain, indent=1)}\n```'})

  def best(self, state: TrainState, accuracy: float) -> None:
    """Saves a state as the best one, if it is."""
    if self._checkpoint:
      self.saver.save_best(state, accuracy)

  def last(self, state: TrainState) -> None:
    """Saves the state at the end of the training."""
    if self._checkpoint:
      self.saver.save(state, {'tally': {}, 'evaluated': True})

  def flush(self) -> None:
    """Waits until all is on the disk."""
    self.writer.flush()
    self.saver.wait()

  def close(self) -> None:
    """Waits for saves under way, and closes the files."""
    try:
      self.saver.close()
    finally:
      self.writer.close()
