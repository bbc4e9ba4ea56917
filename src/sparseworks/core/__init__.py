"""The algebra of sparsity: patterns, scores, budgets, schedules, masks, evidence, registry.

Imports torch and the standard library only.
"""
