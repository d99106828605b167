"""A minimal DeepResearcher: GRPO on a research agent. README.md has the order in which to read
these files.
"""
