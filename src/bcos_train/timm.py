"""Register the models in timm: ``import bcos_train.timm``, then ``timm.create_model("bcos_resnet50")``."""

import bcos_train.integrations.timm  # noqa: F401 - registers the models
