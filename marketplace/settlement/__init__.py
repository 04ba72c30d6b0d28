"""Paying operators: earnings, withdrawals, batches, approvals, broadcasts."""
