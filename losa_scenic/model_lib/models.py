"""Model classes by `config.model_name`."""

from losa_scenic.common_lib import errors
from losa_scenic.model_lib.classification_model import ClassificationModel

MODELS = {'classification': ClassificationModel}


def get_model_cls(name: str) -> type[ClassificationModel]:
  """The model class of that name. Raises `UserError` for an unknown one."""
  return MODELS[errors.one_of('model_name', name, MODELS)]
