"""Errors, files, devices and host memory: what every other package may import."""
