"""Other libraries' ways to build the models: timm (``import bcos_train.timm``) and torch.hub (``hubconf.py``)."""
