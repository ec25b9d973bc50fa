"""A train step as a run would compile it, without data, weights or devices of its own."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from losa_scenic.adapt_lib.method import partition
from losa_scenic.common_lib import errors, trees
from losa_scenic.common_lib.types import Config, DType, Params
from losa_scenic.model_lib import attention, models, packing, quantised, streaming
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.classification_model import DTYPES, ClassificationModel
from losa_scenic.train_lib import optimizers, sharding, steps
from losa_scenic.train_lib.state import TrainState


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device.

  Attributes:
    arguments: weights, optimizer state, batch.
    outputs: what the step returns, apart from what takes the place of arguments.
    temporary: everything in between, at its peak.
  """

  arguments: int
  outputs: int
  temporary: int

  @property
  def total(self) -> int:
    """All of it, in bytes."""
    return self.arguments + self.outputs + self.temporary

  def parts(self) -> dict[str, int]:
    """All of it by name, the total last."""
    return {**dataclasses.asdict(self), 'total': self.total}


@dataclasses.dataclass(frozen=True)
class Step:
  """What is compiled.

  Attributes:
    model: the adapted model; its dtype, layer loop and rematerialisation count.
    head: says what the loss and the metrics are.
    tx: the optimizer.
    batch_size: images or clips of all devices together.
    mesh: devices along each axis, as `config.mesh`.
    frozen_dtype: dtype that frozen parameters are stored in; trained ones are float32.
    inputs_dtype: dtype of the images.
    mixed: whether images are mixed in pairs, so that labels are shares.
    accumulate: parts of the batch that are computed one after the other.
    max_bad_steps: as in a run's config.
  """

  model: Adapted
  head: ClassificationModel
  tx: optax.GradientTransformation
  batch_size: int = 1
  mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
  frozen_dtype: DType = jnp.float32
  inputs_dtype: DType = jnp.uint8
  mixed: bool = False
  accumulate: int = 1
  max_bad_steps: int = 1

  def function(self, model: Adapted | None = None) -> Callable[..., Any]:
    """(state, frozen, batch) -> (state, metrics): `steps.train_step`, of another model if given."""
    return functools.partial(
      steps.train_step,
      flax_model=self.model if model is None else model,
      loss_fn=self.head.loss_function,
      metrics_fn=self.head.get_metrics_fn_jit('train'),
      tx=self.tx,
      accumulate=self.accumulate,
      max_bad_steps=self.max_bad_steps,
    )

  @functools.cached_property
  def state(self) -> tuple[TrainState, Params]:
    """State and frozen parameters, as `jax.ShapeDtypeStruct`s."""
    variables = dict(self.model.variable_shapes())
    trainable, frozen = partition(variables.pop('params'), self.model.method)
    create = functools.partial(TrainState.create, tx=self.tx, rng=jax.random.key(0))
    state = jax.eval_shape(lambda t, v: create(t, model_state=v), trainable, variables)
    frozen = quantised.stored(frozen, self.frozen_dtype)
    return state, packing.pack_shapes(frozen)[1] if self.model.stream else frozen

  def batch(self, size: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of that many images; of `batch_size` by default."""
    size = self.batch_size if size is None else size
    batch = {
      'inputs': jax.ShapeDtypeStruct(self.model.input_shape(size), self.inputs_dtype),
      'label': jax.ShapeDtypeStruct((size,), jnp.int32),
      'batch_mask': jax.ShapeDtypeStruct((size,), jnp.float32),
    }
    if self.mixed:
      batch['partner_label'], batch['label_share'] = batch['label'], batch['batch_mask']
    return batch

  def compile(
    self, devices: Sequence[Any], way: str | None, options: Mapping[str, Any] | None
  ) -> Any:
    """The step, compiled for devices that need not be there (`jax.stages.Compiled`).

    Args:
      devices: all of the mesh, row by row.
      way: of attention, see `attention.using`; None for that of the default backend.
      options: XLA's.

    Raises:
      errors.UserError: if the mesh or the batch does not suit the devices.
    """
    mesh = sharding.make_mesh(self.mesh, devices)
    self.check_mesh(mesh)
    state, frozen = self.state
    everywhere, frozen_shardings = sharding.replicated(mesh), _shardings(frozen, mesh)
    placed = jax.jit(
      self.function(self.model.clone(gather=sharding.gather(frozen_shardings, mesh))),
      in_shardings=(everywhere, frozen_shardings, sharding.batched(mesh)),
      out_shardings=everywhere,
      donate_argnums=0,
    )
    with attention.using(way) if way else contextlib.nullcontext():
      lowered = placed.lower(state, frozen, self.batch())
    return lowered.compile(compiler_options=dict(options) if options else None)

  def check_mesh(self, mesh: Mesh) -> None:
    """Raises `UserError` unless every device gets equally many images, in each part."""
    self.model.method.check_devices(mesh.size)
    visits = self.model.stream.microbatches if self.model.stream else 1
    sharding.check_batch_size('batch_size', self.batch_size, mesh, self.accumulate, visits)

  def sizes(self, devices: int) -> dict[str, int]:
    """Bytes of the arguments on each device: frozen, trainable, optimizer, batch, other.

    Frozen layers in the host's memory are 'host', which is not on the device.

    Raises:
      errors.UserError: if the mesh or the batch does not suit so many devices.
    """
    made = sharding.make_mesh(self.mesh, range(devices))
    self.check_mesh(made)
    mesh: Any = AbstractMesh(tuple(made.shape.values()), tuple(made.shape))
    state, frozen = self.state
    where = trees.flatten(sharding.frozen_shardings(frozen, mesh))
    hosted = packing.hosted(frozen)
    frozen = {
      path: total_bytes(jax.ShapeDtypeStruct(where[path].shard_shape(leaf.shape), leaf.dtype))
      for path, leaf in trees.flatten(frozen).items()
    }
    host = sum(frozen.pop(path) for path in hosted)
    everything = total_bytes(state)
    trainable, optimizer = total_bytes(state.trainable), total_bytes(state.opt_state)
    return {
      'host': host,
      'frozen': sum(frozen.values()),
      'trainable': trainable,
      'optimizer': optimizer,
      'batch': total_bytes(self.batch(self.batch_size // devices)),
      'other': everything - trainable - optimizer,
    }


class _Host(NamedSharding):
  """In the host's memory: JAX forgets the kind of memory of devices that are only described."""

  @property
  def memory_kind(self) -> str:
    return packing.HOST

  def __eq__(self, other: object) -> bool:
    return isinstance(other, _Host) and self.mesh == other.mesh and self.spec == other.spec

  def __hash__(self) -> int:
    return hash((self.mesh, self.spec, packing.HOST))


def _shardings(frozen: Params, mesh: Mesh) -> dict[str, Any]:
  """`sharding.frozen_shardings`, also on devices that are only described."""
  table = trees.flatten(sharding.frozen_shardings(frozen, mesh))
  for path in packing.hosted(frozen):
    if table[path].memory_kind is None:
      table[path] = _Host(mesh, table[path].spec)
  return trees.unflatten(table)


def of_config(config: Config, num_classes: int) -> Step:
  """The step of a run; no data and no weights are read.

  Args:
    config: as `run_config.resolve` returns it.
    num_classes: width of the classifier, which a run learns from its data.

  Raises:
    errors.UserError: for a name or value that no run can have.
  """
  errors.check_at_least('num_classes', num_classes, 1)
  head = models.get_model_cls(config.model_name)(config, {'num_classes': num_classes})
  return Step(
    model=head.flax_model,
    head=head,
    tx=optimizers.get_optimizer(config, optax.constant_schedule(1e-3)),
    batch_size=config.batch_size,
    mesh=config.mesh.to_dict(),
    frozen_dtype=jnp.dtype(errors.one_of('frozen_dtype_str', config.frozen_dtype_str, DTYPES)),
    inputs_dtype=jnp.dtype(config.data_dtype_str),
    mixed=config.augment.mixup_alpha > 0 or config.augment.cutmix_alpha > 0,
    accumulate=config.grad_accum_steps,
    max_bad_steps=config.max_bad_steps,
  )


def streamed(model: Adapted, microbatches: int, frozen_dtype: DType) -> Adapted:
  """The model with its frozen layers in the host's memory.

  Args:
    model: without that.
    microbatches: see `streaming.Stream`.
    frozen_dtype: dtype that frozen weights are stored in.

  Raises:
    errors.UserError: if no layers are frozen.
  """
  frozen = partition(model.param_shapes(), model.method)[1]
  layout, _ = packing.pack_shapes(quantised.stored(frozen, frozen_dtype))
  return model.clone(stream=streaming.Stream(layout, microbatches))


def memory_of(compiled: Any) -> Memory:
  """What XLA's plan for a compiled step takes of each device."""
  plan = compiled.memory_analysis()
  return Memory(
    plan.argument_size_in_bytes,
    plan.output_size_in_bytes - plan.alias_size_in_bytes,
    plan.temp_size_in_bytes,
  )


def total_bytes(tree: Any) -> int:
  """Bytes of all leaves, arrays or shapes of them."""
  return sum(
    int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)
  )
