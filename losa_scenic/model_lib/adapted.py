"""Backbone + method + classifier: the only model the trainer sees."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Num

from losa_scenic.adapt_lib.method import Method, Run, partition
from losa_scenic.common_lib import compiler, errors
from losa_scenic.common_lib.types import Array, DType
from losa_scenic.model_lib import encode_again, quantised, sites
from losa_scenic.model_lib.encode_again import ReadWith
from losa_scenic.model_lib.encoder import Encoded, Gather, Read, read_layers
from losa_scenic.model_lib.spec import BackboneSpec
from losa_scenic.model_lib.streaming import Stream
from losa_scenic.model_lib.vit import ViT


class Adapted(nn.Module):
  """An adapted classifier of images or clips.

  Parameters: `backbone/...` (with `insert_<site>` subtrees where the method has inserts),
  `side/...`, `shared/...`, and the classifier `output_projection`.

  Attributes:
    spec: the backbone's geometry.
    method: what is inserted, added and trained.
    num_classes: width of the classifier.
    dtype: dtype of compute; the classifier always computes in float32.
    scan: scan over stacked layers instead of unrolling them.
    remat: recompute layers in the backward pass.
    gather: what the weights of a layer pass through just before it runs, see `encoder.Encoder`.
    quantisation: what the frozen linear layers of blocks are stored as, a key of `quantised.KINDS`;
      None for floats.
    stream: how layers run that are packed in the host's memory, see `streaming`; parameters are
      initialised unpacked all the same.
  """

  spec: BackboneSpec
  method: Method
  num_classes: int
  dtype: DType = jnp.float32
  scan: bool = False
  remat: bool = False
  gather: Gather | None = None
  quantisation: str | None = None
  stream: Stream | None = None

  def compiler_options(self, *, encodes: bool = True) -> dict[str, Any] | None:
    """`compiler_options` of `jax.jit` for programs of the model; see `compiler.options`."""
    return compiler.options(self.quantisation, encodes=encodes, scanned=self.scan, dtype=self.dtype)

  def setup(self):
    if self.quantisation is not None:
      quantised.check(
        self.quantisation,
        trains_kernels=self.method.trains_kernels,
        spares_backbone=self.method.spares_backbone,
      )
    if self.scan and self.method.unrolled:
      raise errors.UserError(
        "This method treats layers differently: they cannot be scanned (layer_loop 'unroll')."
      )
    self.backbone = ViT(
      self.spec,
      self.method.inserts,
      self.method.collect,
      dtype=self.dtype,
      scan=self.scan,
      remat=self.remat,
      gather=self.gather,
      quantisation=self.quantisation,
      stream=self.stream,
      frozen=self.method.spares_backbone,
    )
    self.shared = self.method.shared() if self.method.shared else None
    self.side = self.method.side() if self.method.side else None
    self.output_projection = nn.Dense(
      self.num_classes, kernel_init=nn.initializers.zeros, dtype=jnp.float32
    )

  def features(
    self,
    inputs: Num[Array, 'b *thw c'] | None,
    *,
    train: bool = False,
    encoded: Encoded | None = None,
  ) -> Float[Array, 'b d']:
    """The pooled features that the classifier sees; the arguments are those of a call."""
    shared = self.shared() if self.shared is not None else None

    def encode(
      images: Array | None,
      *,
      per_layer: Any = None,
      train: bool = False,
      read: Read | None = None,
    ) -> Encoded:
      if encoded is not None:
        values = encoded.layers
        values = values if read is None else read_layers(values, self.spec.depth, read)
        return dataclasses.replace(encoded, layers=values)
      if images is None:
        raise ValueError('Neither inputs are given nor what the encoder made of them.')
      return self.backbone.encode(
        images, per_layer=per_layer, shared=shared, train=train, read=read
      )

    def encode_twice(images: Array | None, read: ReadWith, weights: Sequence[Any]) -> Encoded:
      if encoded is not None or images is None or self.is_initializing():
        return encode(images, read=lambda i, values: read(i, weights[i], values))
      self._check_spared()
      backbone, variables = self.backbone.unbind()
      return encode_again.run(backbone, read, variables, images, list(weights))

    def normed(tokens: Array, *, train: bool = False) -> Array:
      return self.backbone.normed(tokens, shared=shared, train=train)

    def pooled(tokens: Array, *, train: bool = False) -> Array:
      return self.backbone.pooled(tokens, shared=shared, train=train)

    run = Run(
      encode,
      encode_twice,
      normed,
      pooled,
      self.backbone.tokens_read,
      scanned=self.scan,
      frozen=self.method.spares_backbone,
    )
    if self.side is not None:
      return self.side(run, inputs, train=train)
    return run.features(run.encode(inputs, train=train).tokens, train=train)

  def encode(self, inputs: Num[Array, 'b *thw c']) -> Encoded:
    """One pass through the frozen encoder, for methods that never change what it computes.

    Raises:
      ValueError: for a method that does not spare the backbone.
    """
    self._check_spared()
    return self.backbone.encode(inputs)

  def _check_spared(self) -> None:
    if not self.method.spares_backbone:
      raise ValueError('This method changes what the encoder computes.')

  def __call__(
    self,
    inputs: Num[Array, 'b *thw c'] | None,
    *,
    train: bool = False,
    debug: bool = False,
    encoded: Encoded | None = None,
  ) -> Float[Array, 'b classes']:
    """Logits, float32.

    Args:
      inputs: images or clips; None where `encoded` is given.
      train: whether this is a training pass.
      debug: part of Scenic's signature, without effect.
      encoded: what `encode` gave for the inputs, which is then not computed again.
    """
    del debug
    features = self.features(inputs, train=train, encoded=encoded)
    return self.output_projection(features.astype(jnp.float32))

  def input_shape(self, batch: int = 1) -> tuple[int, ...]:
    """Shape of a batch of inputs."""
    return (batch, *self.spec.input_shape)

  def param_shapes(self) -> dict[str, Any]:
    """All parameters as `jax.ShapeDtypeStruct`s; nothing is allocated.

    Raises:
      errors.UserError: as `variable_shapes`.
    """
    return self.variable_shapes()['params']

  def variable_shapes(self) -> dict[str, Any]:
    """All variables, the parameters under 'params', as `jax.ShapeDtypeStruct`s.

    Raises:
      errors.UserError: if an insert of the method is never called, because another one around its
        site does not call the operation it was given, or a side network leaves the site out.
    """
    called: set[str] = set()

    def note(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
      called.update(context.module.path)
      return call(*args, **kwargs)

    inputs = jax.ShapeDtypeStruct(self.input_shape(), jnp.float32)
    with nn.intercept_methods(note):
      variables = jax.eval_shape(self.init, jax.random.key(0), inputs)
      if sites.split(self.method.inserts)[0]:
        # A side network may leave out the final norm or the pooling, but for their parameters.
        called.clear()
        jax.eval_shape(self.apply, variables, inputs)
    names = [sites.name_of(where) for where in self.method.inserts]
    unreached = [name for name in names if f'insert_{name}' not in called]
    if unreached:
      raise errors.UserError(f'No pass through the model reaches the inserts at {unreached}.')
    return variables

  def init_trainable(self, rng: Array) -> dict[str, Any]:
    """Fresh trainable parameters; the frozen ones are never computed."""

    def init(rng: Array) -> dict[str, Any]:
      inputs = jnp.zeros(self.input_shape(), jnp.float32)
      return partition(self.init(rng, inputs)['params'], self.method)[0]

    return jax.jit(init)(rng)

  def init_model_state(self) -> dict[str, Any]:
    """Variables that are no parameters, such as running means of a BatchNorm; {} for most methods.

    They start at constants: no random numbers are involved.
    """
    inputs = jnp.zeros(self.input_shape(), jnp.float32)

    def init() -> dict[str, Any]:
      variables = self.init(jax.random.key(0), inputs)
      return {name: values for name, values in variables.items() if name != 'params'}

    return jax.jit(init)() if jax.eval_shape(init) else {}
