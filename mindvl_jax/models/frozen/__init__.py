"""Networks that generation runs and nothing trains: text encoders, image autoencoders.

Each is a function of the published tensors by their published names; no layout of our own stands between.
"""
