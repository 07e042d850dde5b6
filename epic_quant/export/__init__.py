"""A policy's weights as files that engines load: `python -m epic_quant.export SOURCE --policy P --format F OUT`.

policy -> the specs that the format has (`holding`) -> `PolicyWeights` -> pieces of tensors -> the file
"""
