"""Where KV lies, and who writes what where: layouts, plans, proofs and checksums.

Functions of their arguments alone: no engine, no lock, no clock.
"""
