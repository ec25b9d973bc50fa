"""Image classification with an adapted backbone, behind Scenic's model contract.

The contract: `build_flax_model`, `loss_function`, `get_metrics_fn(_jit)`,
`default_flax_model_config` and the attributes `config`, `dataset_meta_data`, `flax_model`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jaxtyping import Float

from losa_scenic.adapt_lib import methods
from losa_scenic.adapt_lib.method import BACKBONE, Method, partition
from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib import errors, trees
from losa_scenic.common_lib.types import Array, Batch, Config, DType, Metrics, Params
from losa_scenic.model_lib import packing, quantised, streaming
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.weights_lib import backbones

DTYPES = ('float32', 'bfloat16', 'float16')
LAYER_LOOPS = ('auto', 'scan', 'unroll')

MetricsFn = Callable[[Array, Batch], Metrics]


def is_scanned(method: Method, layer_loop: str, *, split: bool = False) -> bool:
  """Whether a model scans its layers.

  Args:
    method: the method.
    layer_loop: one of `LAYER_LOOPS`.
    split: whether several devices share the weights of the layers.
  """
  if layer_loop != 'auto':
    return layer_loop == 'scan'
  # Unrolled layers run faster. But compiling a backward pass through them takes long, and their
  # weights may all be gathered before the first one runs.
  return not method.unrolled and (split or not method.spares_backbone)


class ClassificationModel:
  """A backbone, a method and a classifier, made from a config.

  Attributes:
    config: the run's config (fields: backbone, backbone_configs, method, method_configs,
      model_dtype_str, frozen_dtype_str, frozen_memory, stream_microbatches,
      backbone_quantisation, layer_loop, remat, mesh, label_smoothing).
    dataset_meta_data: the dataset's `meta_data` (fields: num_classes, metric).
    backbone: the backbone that the config names.
    flax_model: the Linen module.
  """

  def __init__(self, config: Config | None, dataset_meta_data: Mapping[str, Any]):
    self.config = self.default_flax_model_config() if config is None else config
    self.dataset_meta_data = dataset_meta_data
    self.backbone = backbones.find(
      self.config.backbone, config_lib.to_dict(self.config.get('backbone_configs'))
    )
    self.flax_model = self.build_flax_model()

  def default_flax_model_config(self) -> Config:
    """A tiny model, for tests that need one."""
    return ml_collections.ConfigDict(
      {'backbone': 'test/8', 'method': 'losa', 'random_backbone': True}
    )

  def build_flax_model(self) -> Adapted:
    """The Linen module that the config describes."""
    config = self.config
    method = methods.build(config.method, self.backbone.spec, methods.options(config))
    loop = errors.one_of('layer_loop', config.get('layer_loop', 'auto'), LAYER_LOOPS)
    dtype = errors.one_of('model_dtype_str', config.get('model_dtype_str', 'float32'), DTYPES)
    fsdp, parts = (config.get('mesh') or {}).get('fsdp', 1), config.get('stream_microbatches', 1)
    streamed = streaming.check(
      config.get('frozen_memory', 'device'),
      parts,
      spares_backbone=method.spares_backbone,
      fsdp=fsdp,
    )
    # The mesh of a run may change, but random weights depend on the loop.
    split = self.backbone.weights is not None and fsdp != 1
    model = Adapted(
      spec=self.backbone.spec,
      method=method,
      num_classes=self.dataset_meta_data['num_classes'],
      dtype=jnp.dtype(dtype),
      scan=is_scanned(method, loop, split=split),
      remat=config.get('remat', False),
      quantisation=config.get('backbone_quantisation'),
    )
    if not streamed:
      return model
    layout, _ = packing.pack_shapes(self._shapes(model)[1])
    return model.clone(stream=streaming.Stream(layout, parts))

  def _shapes(self, model: Adapted) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of (trainable, frozen) parameters as they are stored, but for their being packed."""
    trainable, frozen = partition(model.param_shapes(), model.method)
    return trainable, quantised.stored(frozen, self._frozen_dtype())

  def _frozen_dtype(self) -> DType:
    name = self.config.get('frozen_dtype_str', 'float32')
    return jnp.dtype(errors.one_of('frozen_dtype_str', name, DTYPES))

  def param_shapes(self) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `init_params` returns, as `jax.ShapeDtypeStruct`s."""
    trainable, frozen = self._shapes(self.flax_model)
    return trainable, packing.pack_shapes(frozen)[1] if self.flax_model.stream else frozen

  def identity(self) -> dict[str, Any]:
    """What a checkpoint must agree with: the backbone, the method, its options and their files."""
    options, quantisation = methods.options(self.config), self.flax_model.quantisation
    # Without the key where weights are floats, as in checkpoints from before there was a choice.
    stored = {} if quantisation is None else {'quantisation': quantisation}
    return {
      'backbone': self.backbone.identity() | stored,
      'method': {self.config.method: options, 'files': self.flax_model.method.files},
    }

  def init_params(
    self, rng: Array, shardings: tuple[Params, Params] | None = None
  ) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fresh trainable parameters and the frozen ones, with the stored weights in both.

    Args:
      rng: a key; it also makes a preset's random backbone.
      shardings: where the leaves of the two trees live, on devices of all processes; each device
        receives its part alone. None: on JAX's own choice of a device.

    Returns:
      (trainable in float32, frozen as `quantised.stored` says and, if streamed, packed).

    Raises:
      errors.UserError: for a frozen random backbone unless `config.random_backbone` allows it, and
        for weights that do not fit.
    """
    model, config, stream = self.flax_model, self.config, self.flax_model.stream
    trainable, frozen = self._shapes(model)
    where = trees.flatten(shardings[0]) | trees.flatten(shardings[1]) if shardings else {}
    buffer = packing.place_of(where)
    if self.backbone.weights is None:
      if trees.count(frozen) and not config.get('random_backbone', False):
        raise errors.UserError(
          f"Backbone '{config.backbone}' has random weights and method '{config.method}' would "
          'freeze them. Name a pretrained backbone '
          f'({", ".join(backbones.packaged()) or "none is packaged"}, or a file), or say '
          '--config.random_backbone=True.'
        )

      def init(key: Array) -> tuple[dict[str, Any], dict[str, Any]]:
        values = model.init(key, jnp.zeros(model.input_shape()))
        trainable, made = partition(values['params'], model.method)
        made = jax.tree.map(lambda leaf, want: leaf.astype(want.dtype), made, frozen)
        return _cast(trainable, jnp.float32), made

      if stream is None:
        return _compute(init, rng, shardings)
      unpacked = shardings and (shardings[0], packing.unpacked_shardings(frozen, shardings[1]))
      made, frozen = _compute(init, rng, unpacked)
      return made, packing.pack_tree(frozen, stream.layout, buffer)
    own, wanted = trees.flatten(trainable), trees.flatten(self.param_shapes()[1])
    packer = packing.Packer(stream.layout, buffer) if stream else None

    def place(path: str, value: np.ndarray) -> Any:
      if packer is not None and packer.put(path, value):
        return None
      sharding = where.get(f'{BACKBONE}/{path}')
      if sharding is None:
        return jax.device_put(value)
      return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    stored = backbones.load(
      self.backbone,
      stack=model.scan and packer is None,
      dtype=lambda path: jnp.float32 if f'{BACKBONE}/{path}' in own else self._frozen_dtype(),
      place=place,
      quantisation=model.quantisation,
    )
    flat = {p: leaf for p, leaf in trees.flatten({BACKBONE: stored}).items() if leaf is not None}
    if packer is not None:
      flat |= packer.packed()
    trainable = _compute(model.init_trainable, rng, shardings and shardings[0])
    trainable = _replace(trainable, flat)
    missing = [path for path in wanted if path not in flat]
    unused = [p for p in flat if p not in wanted and p not in trees.flatten(trainable)]
    wrong = [p for p, leaf in wanted.items() if p in flat and flat[p].shape != leaf.shape]
    if missing or unused or wrong:
      raise errors.UserError(
        f"The weights of backbone '{config.backbone}' do not fit the model: missing "
        f'{missing[:5]}, unused {unused[:5]}, other shape {wrong[:5]}.'
      )
    return trainable, trees.unflatten({path: flat[path] for path in wanted})

  def release_weights(self) -> None:
    """Forgets where the stored weights are, once `init_params` has read them.

    What a file held in memory is free then; the backbone keeps its hash.
    """
    self.backbone = self.backbone.released()

  def loss_function(
    self, logits: Float[Array, 'b classes'], batch: Batch, model_params: Params | None = None
  ) -> Float[Array, '']:
    """Softmax cross-entropy with label smoothing, averaged over the unmasked examples.

    `batch['label']` holds class ids [b] or, after mixing images, probabilities [b classes].
    `model_params` belongs to Scenic's signature; regularisation is the optimizer's (decoupled).
    """
    del model_params
    losses = _cross_entropy(logits, batch['label'], self.config.get('label_smoothing') or 0.0)
    mask = batch['batch_mask']
    return (losses * mask).sum() / jnp.maximum(mask.sum(), 1.0)

  def get_metrics_fn_jit(self, split: str | None = None) -> MetricsFn:
    """`fn(logits, batch) -> {name: (sum, normalizer)}` over a global batch, under `jax.jit`."""
    del split
    return functools.partial(
      classification_metrics, per_class=self.dataset_meta_data.get('metric') == 'per_class'
    )

  def get_metrics_fn(self, split: str | None = None) -> MetricsFn:
    """Like `get_metrics_fn_jit`, summed over a mapped axis 'batch' (Scenic's pmap trainers)."""
    metrics = self.get_metrics_fn_jit(split)
    return lambda logits, batch: jax.lax.psum(metrics(logits, batch), axis_name='batch')


def _compute(init: Callable[[Array], Any], rng: Array, shardings: Any) -> Any:
  """`init(rng)`, computed where it will live."""
  # Through the host: a key on a device of this process could not go to those of others.
  data, kind = np.asarray(jax.random.key_data(rng)), jax.random.key_impl(rng)
  made = jax.jit(
    lambda data: init(jax.random.wrap_key_data(data, impl=kind)), out_shardings=shardings
  )
  return made(data)


def _cast(params: Params, dtype: DType) -> dict[str, Any]:
  return jax.tree.map(lambda leaf: leaf.astype(dtype), dict(params))


def _replace(trainable: Params, stored: Mapping[str, Any]) -> dict[str, Any]:
  """Trainable leaves with those that have stored weights taken from there."""
  flat = trees.flatten(trainable)
  for path in set(flat) & set(stored):
    if flat[path].shape != stored[path].shape:
      raise errors.UserError(
        f'Stored weights {path} are {stored[path].shape}, the model needs {flat[path].shape}.'
      )
  # Copies: a stored weight may lie in a mapped file, and what trains is written to.
  return trees.unflatten(
    {path: jnp.array(stored[path]) if path in stored else leaf for path, leaf in flat.items()}
  )


def _cross_entropy(logits: Array, label: Array, smoothing: float) -> Float[Array, ' b']:
  target = label if label.ndim == 2 else jax.nn.one_hot(label, logits.shape[-1])
  return optax.softmax_cross_entropy(logits, optax.smooth_labels(target, smoothing))


def classification_metrics(
  logits: Float[Array, 'b classes'], batch: Batch, *, per_class: bool = False
) -> dict[str, tuple[Array, Array]]:
  """Sums of accuracy and loss over the unmasked examples, with their normalizers.

  Args:
    logits: float32.
    batch: 'label' (ids [b] or probabilities [b classes]) and 'batch_mask' [b] in {0, 1}.
    per_class: also 'per_class_accuracy', a pair of vectors [classes] whose ratios are to be
      averaged over the classes that occur.

  Returns:
    {'accuracy', 'loss'[, 'per_class_accuracy']: (sum, normalizer)}; the loss is not smoothed.
  """
  label, mask = jnp.asarray(batch['label']), jnp.asarray(batch['batch_mask'])
  ids = label if label.ndim == 1 else label.argmax(-1)
  correct = jnp.where(logits.argmax(-1) == ids, mask, 0.0)
  metrics = {
    'accuracy': (correct.sum(), mask.sum()),
    'loss': ((_cross_entropy(logits, label, 0.0) * mask).sum(), mask.sum()),
  }
  if per_class:
    one_hot = jax.nn.one_hot(ids, logits.shape[-1])
    metrics['per_class_accuracy'] = (correct @ one_hot, mask @ one_hot)
  return metrics
