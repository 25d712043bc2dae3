"""Write a data set as WebDataset shards: tar files of about 1 GB, instead of a million image files.

python scripts/make_shards.py dataset=imagenet out=shards
python scripts/make_shards.py dataset=imagefolder dataset.root=photos out=shards max_side=512 order=balanced
python train.py model=resnet50 dataset=imagenet dataset.storage=shards dataset.shards=shards

The keys are those of train.py and: out=<folder>, samples=<in each shard> or megabytes=<of each shard>, quality=<JPEG>,
max_side=<pixels>, order=dataset|balanced, num_workers=<shards written at once>. The same command continues after an
interruption; --verify (or verify=true) reads all shards again and compares them with the manifest.
"""

import sys

from bcos_train.commands import make_shards

if __name__ == "__main__":
    sys.argv = ["verify=true" if argument == "--verify" else argument for argument in sys.argv]
    make_shards()
