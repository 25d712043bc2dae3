"""Compute a teacher's logits and explanation maps once for each image, for training without the teacher in memory.

python scripts/precompute_teacher.py dataset=cifar10 distillation.teacher=runs/cifar10/resnet56/… out=maps
python scripts/precompute_teacher.py dataset=imagenet distillation.teacher=densenet169 out=maps size=56 batch_size=256
python train.py dataset=cifar10 distillation=e2kd_frozen distillation.frozen=maps

The keys are those of train.py and: out=<folder>, size=<side of the maps>, dtype=float16|float32, verify=true. The size
on disk is announced first. The same command continues after an interruption; with verify=true it reads all shards again
and computes the damaged ones.
"""

from bcos_train.commands import precompute_teacher

if __name__ == "__main__":
    precompute_teacher()
