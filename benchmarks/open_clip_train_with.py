"""Run ``open_clip_train`` with a model that open_clip does not list.

    python benchmarks/open_clip_train_with.py MODEL.json OPTIONS OF open_clip_train.main ...

The file's name without ``.json`` is the model name for ``--model``.
"""

import sys

import open_clip
from open_clip_train.main import main

if __name__ == "__main__":
    open_clip.add_model_config(sys.argv[1])
    main(sys.argv[2:])
