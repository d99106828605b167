"""A minimal DeepResearcher: GRPO on a research agent that thinks, searches, browses and answers.

Reading order: trajectory, reward, grpo, protocol, rollout, search, browse, engine, policy, then train.py.
"""
