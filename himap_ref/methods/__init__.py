"""Baselines and schedules: add a score (scores.py), a reducer before the decoder (reducers.py) or a name for stages.
schedules.py has the names and reads stages as text; plan.py foretells what stages do without running them."""
