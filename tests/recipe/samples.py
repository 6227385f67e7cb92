"""Small recipes that are right, for tests to read or to spoil."""

PRETRAIN = """\
stage: pretrain
data: {kind: digits}
augment: {image_size: 16}
backbone: {depth: 10, width: 0.25, stem: cifar}
optimizer: {kind: lars, learning_rate: 1e-1}
schedule: {epochs: 3}
batch: {global_batch: 64}
"""

FINETUNE = """\
stage: finetune
data: {kind: folder, root: images}
augment: {image_size: 32}
labels: {per_class: 2}
optimizer: {kind: sgd, learning_rate: 0.1}
schedule: {steps: 10}
batch: {global_batch: 8}
"""

PIPELINE = """\
stage: pipeline
steps:
  - {name: pretrain, recipe: one}
  - {name: finetune, recipe: two, parent: pretrain, grid: {labels.per_class: [1, 2]}}
"""

LONGEST_INTEGER = 2**63 - 1
