"""Locomotion data like D4RL's, made here: behaviour agents of a stated level and what they did.

`facts` knows the environments and D4RL's reference scores, `trajectory` records, `agent` learns.
The agents are stable-baselines3's PPO, which the extra `locomotion` installs.
"""
