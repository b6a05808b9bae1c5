"""Fine-tune a checkpoint on own data: found, divided, trained, judged and told in one table.

The training is that of `equiformer2.training`; this package decides its settings and prints why.
"""
