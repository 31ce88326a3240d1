"""The frozen pretrained model: loading, blocks, sites."""
