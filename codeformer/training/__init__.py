"""Training of small or full-size weight sets; not used for serving.

The restorer is trained in the three stages of the CodeFormer paper (Zhou et al., 2022), the detector by
distillation. `python -m codeformer.training --help` lists the commands, docs/training.md explains them.
"""
