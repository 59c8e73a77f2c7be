"""Uni-O4: one on-policy objective, offline to online (arXiv:2311.03351), stage by stage."""

from vla_post.learners.uni_o4.data import BadTransitions, Transitions

__all__ = ["BadTransitions", "Transitions"]
