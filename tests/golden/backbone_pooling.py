"""What is pooled of transformers' models: for each, a function of images [2 3 h w]."""

import torch


def cls(model):
  return lambda images: model(pixel_values=images).last_hidden_state[:, 0]


def mean(model):
  return lambda images: model(pixel_values=images).last_hidden_state.mean(1)


def mean_of_patches(model):
  return lambda images: model(pixel_values=images).last_hidden_state[:, 1:].mean(1)


def two_tokens(model):
  return lambda images: model(pixel_values=images).last_hidden_state[:, :2].mean(1)


def pooler(model):
  return lambda images: model(pixel_values=images).pooler_output


def unshuffled(model):
  """MAE's encoder, given noise whose order keeps every patch in its place."""

  def pooled(images):
    count = model.embeddings.patch_embeddings.num_patches
    noise = torch.arange(count).expand(len(images), -1)
    return model(pixel_values=images, noise=noise).last_hidden_state[:, 0]

  return pooled


def naflex(model):
  """SigLIP2 reads flattened patches, rows of (y, x, channel)."""

  def pooled(images):
    p = model.config.patch_size
    side = images.shape[-1] // p
    x = images.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 4, 5, 1)
    return model(
      pixel_values=x.reshape(len(x), side * side, -1),
      pixel_attention_mask=torch.ones(len(x), side * side, dtype=torch.long),
      spatial_shapes=torch.tensor([[side, side]] * len(x)),
    ).pooler_output

  return pooled
