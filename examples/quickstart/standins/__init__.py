"""Stand-ins for the published benchmarks: their files' columns, prompts and metrics on images made from packaged data.

`python -m examples.quickstart.standins.build --out data/standins` writes them. They prove that a file of this form is
read, asked and scored as published. A score on a stand-in says nothing about the benchmark of that name.
"""
