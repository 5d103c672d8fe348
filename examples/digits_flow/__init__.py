"""A small diffusion transformer that draws digits, and a classifier that judges them (`configs/digits-flow.yaml`)."""
