"""A small diffusion transformer that learns to write digits, and a judge that reads them: `configs/digits-flow.yaml`."""
