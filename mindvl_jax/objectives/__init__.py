"""What a model is trained to do: loss terms of a micro-batch, what is displayed of them, and updates that gradients do
not make.
"""
