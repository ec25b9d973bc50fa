"""The same network trained by timm and peft, which is what many would use instead.

PyTorch's own attention, SGD with momentum in one fused kernel, all weights (and momentum) in the
dtype of the setting: with bfloat16 there is no float32 copy of what trains, and no autocast, which
is as fast as it gets. GELU is timm's, by erf, which PyTorch computes several times as fast on CPUs
as the form with tanh of JAX's checkpoints. Images are on the device, float and already normalised.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

from losa_scenic.bench_lib.speed_rows import Row, Run, Setting
from losa_scenic.common_lib import errors
from losa_scenic.model_lib.spec import BackboneSpec

# Presets that timm has, too. What is built is of that class and shape, pooled as the preset is.
NAMES = {
  'Ti/16': 'vit_tiny_patch16_224',
  'S/16': 'vit_small_patch16_224',
  'B/16': 'vit_base_patch16_224',
  'L/16': 'vit_large_patch16_224',
  'H/14': 'vit_huge_patch14_224',
  'g/14': 'vit_giant_patch14_224',
  'G/14': 'vit_gigantic_patch14_224',
}
# What `torch.compile` is given: nothing, each block by itself (compiled once for all of them, which
# takes a fraction of the time), or the whole model.
COMPILE = ('off', 'blocks', 'model')
_POOLS = {'cls': 'token', 'gap': 'avg', 'map': 'map'}
_GEOMETRY = ('name', 'width', 'depth', 'mlp', 'heads', 'patch', 'image_size', 'pool')
_LINEARS = r'.*blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))'


def library(name: str) -> Any:
  """A module that need not be installed, imported when it is needed."""
  return importlib.import_module(name)


def lack(name: str, device: str) -> str | None:
  """Why a library cannot be used on a device; None if it can."""
  try:
    library(name)
    torch = library('torch')
  except Exception as e:  # Also of one whose libraries do not fit each other.
    return ' '.join(str(e).split()) or type(e).__name__
  if device == 'gpu' and not torch.cuda.is_available():
    return 'its torch finds no GPU'
  return None


def vision_transformer(spec: BackboneSpec, num_classes: int) -> Any:
  """timm's model of a preset's shape and pooling, with random weights.

  Args:
    spec: a plain vision transformer of images.
    num_classes: width of the classifier.

  Raises:
    errors.UserError: for a backbone that is more than that, such as one of clips.
  """
  plain = BackboneSpec(
    **{field: getattr(spec, field) for field in _GEOMETRY}, class_token=spec.pool == 'cls'
  )
  if spec != plain or spec.pool not in _POOLS:
    raise errors.UserError(
      f"timm has no peer of backbone '{spec.name}': there is one for plain vision transformers of "
      f'images, such as {", ".join(NAMES)}.'
    )
  return library('timm.models.vision_transformer').VisionTransformer(
    img_size=spec.image_size,
    patch_size=spec.patch,
    num_classes=num_classes,
    embed_dim=spec.width,
    depth=spec.depth,
    num_heads=spec.heads,
    mlp_ratio=spec.mlp / spec.width,
    class_token=spec.class_token,
    global_pool=_POOLS[spec.pool],
    fc_norm=False,
  )


def forward(setting: Setting) -> Run:
  """Logits of the batch in inference mode."""
  torch = library('torch')
  model, images, _ = _on_device(vision_transformer(setting.spec, setting.num_classes), setting)
  model.eval()
  call = _compiled(model, model.blocks, setting)

  def run(steps: int) -> None:
    with torch.inference_mode():
      for _ in range(steps):
        call(images)
    _wait(setting)

  return run


def step(adapt: Callable[[Any], Any], setting: Setting) -> Run:
  """A train step.

  Args:
    adapt: what is done to the model before, such as freezing weights.
    setting: what all rows have in common.
  """
  torch = library('torch')
  plain = vision_transformer(setting.spec, setting.num_classes)
  blocks = plain.blocks
  model, images, labels = _on_device(adapt(plain), setting)
  model.train()
  weights = [weight for weight in model.parameters() if weight.requires_grad]
  optimizer = torch.optim.SGD(weights, lr=1e-3, momentum=0.9, fused=True)
  call = _compiled(model, blocks, setting)

  def run(steps: int) -> None:
    for _ in range(steps):
      torch.nn.functional.cross_entropy(call(images).float(), labels).backward()
      optimizer.step()
      optimizer.zero_grad(set_to_none=True)
    _wait(setting)

  return run


def linear(model: Any) -> Any:
  """All but the classifier frozen."""
  model.requires_grad_(False)
  model.head.requires_grad_(True)
  return model


def lora(rank: int, model: Any) -> Any:
  """peft's LoRA of the four linear layers of every block; the classifier trains with it."""
  peft = library('peft')
  config = peft.LoraConfig(
    r=rank, lora_alpha=rank, target_modules=_LINEARS, modules_to_save=['head']
  )
  return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def _on_device(model: Any, setting: Setting) -> tuple[Any, Any, Any]:
  """The model, its images [b 3 h w] and labels, on the device and in the setting's dtype."""
  torch = library('torch')
  if setting.device == 'cpu':
    torch.set_num_threads(setting.threads)
  else:
    torch.set_float32_matmul_precision('high')  # As JAX does by default.
  where = {'device': 'cuda' if setting.device == 'gpu' else 'cpu'}
  images = torch.from_numpy(setting.images()).permute(0, 3, 1, 2).contiguous()
  images = images.to(**where, dtype=getattr(torch, setting.dtype)) / 127.5 - 1
  labels = torch.from_numpy(setting.labels()).to(**where, dtype=torch.int64)
  return model.to(**where, dtype=images.dtype), images, labels


def _compiled(model: Any, blocks: Any, setting: Setting) -> Callable[..., Any]:
  torch = library('torch')
  if setting.torch_compile == 'blocks':
    for block in blocks:
      block.compile()
  return torch.compile(model) if setting.torch_compile == 'model' else model


def _wait(setting: Setting) -> None:
  torch = library('torch')
  if setting.device == 'gpu':
    torch.cuda.synchronize()


PEERS: dict[str, Row] = {
  'timm_forward': Row('timm forward only', forward, 'timm'),
  'timm_linear': Row('timm linear probe', functools.partial(step, linear), 'timm'),
  'timm_full': Row('timm full fine-tuning', functools.partial(step, lambda model: model), 'timm'),
  'peft_lora32': Row(
    'peft LoRA r=32', functools.partial(step, functools.partial(lora, 32)), 'peft'
  ),
}
